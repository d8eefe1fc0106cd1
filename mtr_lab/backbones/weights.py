"""Load the weights of a model from a checkpoint: a local file, or one on the hub."""

import argparse
import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mtr_lab.backbones.hub import fetch, first_line
from mtr_lab.errors import UserError


@dataclass(frozen=True)
class Weights:
    """The origin of a model's parameters."""

    source: str
    revision: str | None = None
    """The commit on the hub."""
    sha256: str | None = None
    published_top1: float | None = None
    """The ImageNet-1k accuracy that the authors report, a fraction, if the file has the name of theirs."""


def is_meta(model: nn.Module) -> bool:
    """Whether the model is on the meta device, so that it has no weights."""
    return next(model.parameters()).is_meta


def load_weights(
    model: Any,
    checkpoint: str | Path,
    revision: str = "main",
    whole: nn.Module | None = None,
    *,
    any_head: bool = False,
) -> bool:
    """Load a checkpoint strictly, after ``model.fit_weights`` has adapted it to the model's grid, frames and channels.

    Reads safetensors files, and PyTorch files without executing code in them. Sets ``model.weights``.

    Args:
        model: a backbone; ``pretrained_cfg["classifier"]`` names its head.
        checkpoint: a local file or ``hf://OWNER/REPOSITORY/FILE``.
        revision: branch, tag or commit on the hub.
        whole: the model of a task that the checkpoint is of; ``model`` is its ``backbone``.
        any_head: ignore a head for other classes, which a model without a head always does.

    Returns:
        Whether channels and head are those of the checkpoint.

    Raises:
        UserError: the file is absent or corrupt, or its parameters do not fit (they are listed).
    """
    path, commit = fetch(str(checkpoint), revision)
    state = _read(path)
    prefix = "" if whole is None else "backbone."
    of_backbone = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    adapted = model.fit_weights(of_backbone, _metadata(path, "grid_size", int), f"checkpoint {path}")
    state.update({prefix + key: value for key, value in of_backbone.items()})
    classifier = model.pretrained_cfg["classifier"]
    weight = f"{classifier}.weight"
    if whole is None and weight in state and (any_head or model.num_classes == 0):
        head = {f"{classifier}.{key}": value for key, value in model.get_submodule(classifier).state_dict().items()}
        if not head or head[weight].shape != state[weight].shape:
            adapted = True
            if head:
                classes = f"{len(state[weight])} classes, the model {model.num_classes}"
                warnings.warn(f"checkpoint {path.name} has {classes}: the head is left untrained.", stacklevel=5)
            state = {key: value for key, value in state.items() if not key.startswith(f"{classifier}.")} | head
    _check(state, whole or model, path, weight)
    (whole or model).load_state_dict(state, strict=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    source = str(checkpoint) if str(checkpoint).startswith("hf://") else path.name
    model.weights = asdict(Weights(source, commit, digest))
    return not adapted


def checkpoint_label_names(checkpoint: str | Path) -> tuple[str, ...] | None:
    """The class names in the metadata of a local checkpoint, ``None`` if it has none.

    Raises:
        UserError: the file is absent or cannot be read.
    """
    return _metadata(fetch(str(checkpoint), "")[0], "label_names", str)


def _metadata(path: Path, key: str, kind: type) -> tuple[Any, ...] | None:
    """The JSON list of strings or integers in the metadata of a safetensors file under ``key``."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {}).get(key, "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"cannot read checkpoint {path} and its metadata {key}: {first_line(error)}") from error
    if values is not None and not (isinstance(values, list) and all(isinstance(value, kind) for value in values)):
        raise UserError(f"checkpoint {path}: its metadata {key} is not a JSON list of {kind.__name__}.")
    return None if values is None else tuple(values)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler raise anything from KeyError to struct.error
        reason = first_line(error)
        if path.suffix != ".safetensors" and not isinstance(error, OSError):
            # PyTorch's own message advises to execute the file, or quotes an error inside the unpickler.
            reason = "it is neither a safetensors file nor a PyTorch checkpoint that contains tensors alone."
        raise UserError(f"cannot read checkpoint {path}: {reason}") from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"checkpoint {path} contains no state dict: expected parameter names and tensors.")
    return content


def _check(state: Mapping[str, Tensor], model: nn.Module, path: Path, head_weight: str) -> None:
    """Raise a ``UserError`` that lists every parameter that does not fit."""
    expected = model.state_dict()
    wrong = {k: (tuple(state[k].shape), tuple(v.shape)) for k, v in expected.items() if k in state}
    wrong = {k: shapes for k, shapes in wrong.items() if shapes[0] != shapes[1]}
    head = wrong.get(head_weight)
    if head is not None and head[0][1:] == head[1][1:]:
        raise UserError(
            f"checkpoint {path} has {head[0][0]} classes, the model {head[1][0]}: "
            f"create the model with num_classes={head[0][0]} (backbone.num_classes={head[0][0]})."
        )
    problems = [
        *(f"missing {key}" for key in expected.keys() - state.keys()),
        *(f"unexpected {key}" for key in state.keys() - expected.keys()),
        *(f"{key} has shape {shape}, expected {wanted}" for key, (shape, wanted) in wrong.items()),
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:20])
        more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(f"checkpoint {path} does not fit {type(model).__name__}:\n  {shown}{more}")
