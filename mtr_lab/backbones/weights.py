"""Load the weights of a model from a checkpoint: a local file, or one on the hub."""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mtr_lab.backbones.checkpoint_file import StateDict, choose, damaged, files_of, is_safetensors, read
from mtr_lab.backbones.hub import expected_sha256, fetch, is_address
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
    part: str | None = None
    """The entry of the file that they were taken from, and the prefix that its names have there."""


def is_meta(model: nn.Module) -> bool:
    """Whether the model is on the meta device, so that it has no weights."""
    return next(model.parameters()).is_meta


@dataclass(frozen=True)
class Checkpoint:
    """The file with the weights that a user wants."""

    file: str
    """A local path or ``hf://OWNER/REPOSITORY/FILE``; of a sharded checkpoint its index."""
    revision: str = "main"
    """Branch, tag or commit on the hub."""
    key: str | None = None
    """The entry of the file, or the prefix of the names; ``None`` for the weights rather than their moving average."""
    grid: Sequence[int] | None = None
    """(rows, columns) of its patches, if the file does not state them."""


def load_weights(
    model: Any,
    checkpoint: Checkpoint,
    whole: nn.Module | None = None,
    *,
    published: bool = False,
    any_head: bool = False,
) -> bool:
    """Load a checkpoint strictly, after ``model.fit_weights`` has adapted it to the model's grid, frames and channels.

    Reads safetensors files, and PyTorch files without executing code in them. Sets ``model.weights``.

    Args:
        model: a backbone; ``pretrained_cfg["classifier"]`` names its head.
        checkpoint: what to load.
        whole: the model of a task that the checkpoint is of; ``model`` is its ``backbone``.
        published: it is the authors' file, whose main weights on a square grid are meant.
        any_head: leave the head untrained if the checkpoint has other classes or none. A model without one ignores it.

    Returns:
        Whether channels and head are those of the checkpoint, and its main weights were taken.

    Raises:
        UserError: the file is absent or corrupt, or its parameters do not fit (they are listed).
    """
    files, commit = files_of(checkpoint.file, checkpoint.revision)
    path, loaded = files[0], whole or model
    sha256 = _sha256(files)
    chosen, equals = choose(read(files), loaded.state_dict(), checkpoint.key, f"checkpoint {path}")
    if len(equals) > 1 and checkpoint.key is None and not published:
        others = ", ".join(map(str, equals[1:]))
        warnings.warn(
            f"checkpoint {path.name} has several weights: {chosen} was taken, not {others}; "
            f"checkpoint_key={equals[1].key} takes the latter.",
            stacklevel=5,
        )
    prefix = "" if whole is None else "backbone."
    state = dict(chosen.state)
    _check_numbers(state, loaded, path)
    of_backbone = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    grid = checkpoint.grid or _metadata(path, "grid_size", int) or next(filter(None, (s.grid for s in equals)), None)
    before = dict(of_backbone)
    adapted = model.fit_weights(of_backbone, grid, f"checkpoint {path}")
    changed = [key for key, value in before.items() if value is not of_backbone[key]]
    same_size = [key for key in changed if before[key].shape == of_backbone[key].shape]
    if same_size and grid is None and not published:
        rows, columns = model.layouts()[0].grid
        warnings.warn(
            f"checkpoint {path.name} does not state its grid: {same_size[0]} is taken as that of a square and "
            f"interpolated to {rows} x {columns}. If it is that of {rows} x {columns} patches, give "
            f"checkpoint_grid=[{rows},{columns}] (backbone.checkpoint_grid=[{rows},{columns}]).",
            stacklevel=5,
        )
    state.update({prefix + key: value for key, value in of_backbone.items()})
    classifier = model.pretrained_cfg["classifier"]
    weight = f"{classifier}.weight"
    if whole is None and (any_head or model.num_classes == 0):
        head = {f"{classifier}.{key}": value for key, value in model.get_submodule(classifier).state_dict().items()}
        theirs = {key: value for key, value in state.items() if key.startswith(f"{classifier}.")}
        if {key: value.shape for key, value in theirs.items()} != {key: value.shape for key, value in head.items()}:
            adapted = True
            if head:
                classes = theirs[weight].shape[:1] if weight in theirs else ()
                has = (
                    f"{classes[0]} classes, the model {model.num_classes}"
                    if classes and classes[0] != model.num_classes
                    else "no head that fits"
                )
                warnings.warn(f"checkpoint {path.name} has {has}: the head is left untrained.", stacklevel=5)
            state = {key: value for key, value in state.items() if key not in theirs} | head
    _check(state, chosen, loaded, path, weight)
    loaded.load_state_dict(state, strict=True)
    source = checkpoint.file if is_address(checkpoint.file) else path.name
    part = str(chosen) if chosen.entry or chosen.prefix else None
    model.weights = asdict(Weights(source, commit, sha256, part=part))
    return not adapted and checkpoint.key is None


def _sha256(files: Sequence[Path]) -> str:
    """The digest of the files' content, one after the other; raises a ``UserError`` if one is not what it should be."""
    together = hashlib.sha256()
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read checkpoint {file}: {error.strerror}.") from error
        together.update(content)
        expected = expected_sha256(file)
        if expected is not None and hashlib.sha256(content).hexdigest() != expected:
            raise damaged(file, ValueError(f"Its SHA-256 is not {expected}"))
    return together.hexdigest()


def checkpoint_label_names(checkpoint: str | Path, revision: str = "main") -> tuple[str, ...] | None:
    """The class names in the metadata of a checkpoint, ``None`` if it has none.

    Raises:
        UserError: the file is absent or cannot be read.
    """
    return _metadata(fetch(str(checkpoint), revision)[0], "label_names", str)


def checkpoint_classes(checkpoint: str | Path, classifier: str) -> int | None:
    """The number of classes of a safetensors file; ``None`` for other files, and without one head ``classifier``.

    Raises:
        UserError: the file is absent or cannot be read.
    """
    path = fetch(str(checkpoint), "main")[0]
    try:
        if not is_safetensors(path):
            return None
        with safe_open(path, framework="pt") as file:
            heads = [key for key in file.keys() if f".{key}".endswith(f".{classifier}.weight")]  # noqa: SIM118
            shapes = [file.get_slice(key).get_shape() for key in heads]
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error
    return int(shapes[0][0]) if len(shapes) == 1 and len(shapes[0]) == 2 else None


def _metadata(path: Path, key: str, kind: type) -> tuple[Any, ...] | None:
    """The JSON list of strings or integers in the metadata of a safetensors file under ``key``."""
    try:
        if not is_safetensors(path):
            return None
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(key, "null")
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = text
    if values is not None and not (isinstance(values, list) and all(isinstance(value, kind) for value in values)):
        raise UserError(f"checkpoint {path}: its metadata {key} is not a JSON list of {kind.__name__}.")
    return None if values is None else tuple(values)


def _check_numbers(state: Mapping[str, Tensor], model: nn.Module, path: Path) -> None:
    """Raise a ``UserError`` that lists the parameters that no adaptation makes those of the model."""
    common = {key: (state[key], value) for key, value in model.state_dict().items() if key in state}
    problems = [f"{key} {problem}" for key, pair in common.items() if (problem := _no_numbers(*pair))]
    if problems:
        shown = "\n  ".join(problems[:_SHOWN])
        raise UserError(f"checkpoint {path} does not fit {type(model).__name__}:\n  {shown}")


def _check(state: Mapping[str, Tensor], chosen: StateDict, model: nn.Module, path: Path, head_weight: str) -> None:
    """Raise a ``UserError`` that lists every parameter that does not fit."""
    expected = model.state_dict()
    common = {key: (state[key], value) for key, value in expected.items() if key in state}
    head = common.get(head_weight)
    if head is not None and head[0].ndim == 2 and head[0].shape[1] == head[1].shape[1] and len(head[0]) != len(head[1]):
        raise UserError(
            f"checkpoint {path} has {len(head[0])} classes, the model {len(head[1])}: create the model with "
            f"num_classes={len(head[0])} (backbone.num_classes={len(head[0])}), or with new_head=True for an untrained "
            "head."
        )
    missing, others = expected.keys() - state.keys(), chosen.others
    problems = [
        *(f"missing {key}" for key in missing),
        *(f"unexpected {key}" for key in state.keys() - expected.keys()),
        *(f"unexpected {key}, which lacks the prefix" for key in others if missing),
        *(
            f"{key} has shape {tuple(value.shape)}, expected {tuple(wanted.shape)}"
            for key, (value, wanted) in common.items()
            if value.shape != wanted.shape
        ),
    ]
    if problems:
        shown = "\n  ".join(_interleaved(problems))
        more = f"\n  … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        part = f" ({chosen})" if chosen.entry or chosen.prefix else ""
        classifier = head_weight.rpartition(".")[0]
        headless = (
            hasattr(model, "pretrained_cfg")
            and len(problems) == len(missing)
            and all(key.startswith(f"{classifier}.") for key in missing)
        )
        advice = _HEADLESS if headless else _advice(path)
        raise UserError(f"checkpoint {path}{part} does not fit {type(model).__name__}{advice}:\n  {shown}{more}")


_SHOWN = 20
"""The number of problems that a message lists."""


def _interleaved(problems: Sequence[str]) -> list[str]:
    """The first ones of each kind, so that no kind hides another."""
    kinds: dict[str, list[str]] = {}
    for problem in sorted(problems):
        word = problem.partition(" ")[0]
        kinds.setdefault(word if word in ("missing", "unexpected") else "", []).append(problem)
    turns = [line for lines in zip_longest(*kinds.values()) for line in lines if line is not None]
    return sorted(turns[:_SHOWN])


_HEADLESS = "; it has no head: create the model with num_classes=0, or with new_head=True for an untrained head"


def _advice(path: Path) -> str:
    if re.search(r"-\d{5}-of-\d{5}$", path.stem):
        return "; it is one of several files: give their index, FILE.index.json"
    return ": create the model with the arguments of the one that it was saved from"


def _no_numbers(value: Tensor, wanted: Tensor) -> str | None:
    """What is wrong with the values of a parameter of a file, ``None`` if nothing is."""
    if value.is_quantized or value.is_nested or value.layout != torch.strided or value.is_meta:
        return "is quantised, nested, sparse or without values, expected a dense tensor"
    stored = value.untyped_storage().nbytes() // value.element_size()
    if value.numel() > max(stored, wanted.numel()):  # a small file may claim more memory than there is
        return f"has {value.numel()} values, of which the file stores {stored}"
    if value.is_floating_point() != wanted.is_floating_point() or value.is_complex():
        return f"has numbers of {value.dtype}, expected those of {wanted.dtype}, or other floating-point ones"
    if value.is_floating_point() and not bool(value.to(wanted.dtype).isfinite().all()):
        return "has values that are not numbers (NaN) or infinite: its training diverged, take an earlier checkpoint"
    return None
