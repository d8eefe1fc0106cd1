"""Build a registered model and load its weights: from the hub, from a file, or from the package."""

import argparse
import hashlib
import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mtr_lab.backbones.hub import fetch, first_line
from mtr_lab.backbones.pretrained import IMAGENET, label_names, resolve
from mtr_lab.errors import UserError, check_number, unknown
from mtr_lab.tokens.pooling import check_pooling

Model = TypeVar("Model", bound=nn.Module)


PUBLISHED_TOP1 = {
    "vim_t_midclstok_76p1acc.pth": 0.761,
    "vim_t_midclstok_ft_78p3acc.pth": 0.783,
    "vim_s_midclstok_80p5acc.pth": 0.805,
    "vim_s_midclstok_ft_81p6acc.pth": 0.816,
    "vim_b_midclstok_81p9acc.pth": 0.819,
    "videomamba_t16_in1k_res224.pth": 0.769,
    "videomamba_s16_in1k_res224.pth": 0.812,
    "videomamba_m16_in1k_res224.pth": 0.828,
    "videomamba_b16_in1k_res224.pth": 0.827,
}
"""What the authors report of their files on ImageNet-1k. Vim: Zhu et al., arXiv 2401.09417, and the files' own names.
VideoMamba: the model zoo of OpenGVLab/VideoMamba (videomamba/image_sm/MODEL_ZOO.md)."""


@dataclass(frozen=True)
class Weights:
    """Where a model's parameters come from.

    ``revision`` is the commit a hub revision resolved to; ``published_top1`` what their authors report on
    ImageNet-1k, a fraction, where the file is the authors' by its name.
    """

    source: str
    revision: str | None = None
    sha256: str | None = None
    published_top1: float | None = None


def build(
    family: type[Model],
    registered: Mapping[str, Any],
    pretrained: bool,
    defaults: Mapping[str, Any],
    kwargs: Mapping[str, Any],
) -> Model:
    """Construct ``family`` and load weights if asked; the entry point behind every registered name.

    The model carries ``pretrained_cfg`` (timm's data configuration, with its own input size and classes) and
    ``weights`` (a dict of ``Weights``). On the meta device it is an outline: no weights are loaded.

    Args:
        family: a :class:`Backbone` that is a module, with a ``head`` and a method ``fit_weights``.
        registered: the configuration of the name, see ``mtr_lab.backbones.pretrained``.
        pretrained: load the weights it names. The head stays untrained if it has another number of classes.
        defaults: the variant's geometry.
        kwargs: the caller's geometry, with the upstream constructors' names, or ``in_chans`` for ``channels``;
            ``checkpoint`` (a local file or ``hf://OWNER/REPOSITORY/FILE``, used instead of the registered weights),
            ``revision`` (branch, tag or commit on the hub), what timm's factory passes, and for a model that returns
            feature maps ``features_only`` and ``out_indices`` (blocks, or how many of the last).

    Returns:
        The model, or with ``features_only`` timm's wrapper of it, whose ``model`` it is.

    Raises:
        UserError: an unknown argument; weights that cannot be had, cannot be read, or do not fit.
    """
    name, kwargs = registered["architecture"], dict(kwargs)
    checkpoint, revision = kwargs.pop("checkpoint", None), kwargs.pop("revision", "main")
    config = resolve(registered, kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None))
    features_only, out_indices = kwargs.pop("features_only", False), kwargs.pop("out_indices", 3)
    feature_class = kwargs.pop("feature_cls", "getter")
    for key in ("cache_dir", "pretrained_model_args"):  # timm's loader takes them, this one does not
        if kwargs.pop(key, None) is not None:
            raise UserError(f"{key} of {name} cannot be set: give a file as checkpoint=; HF_HUB_CACHE moves the cache.")
    if "in_chans" in kwargs:
        kwargs["channels"] = kwargs.pop("in_chans")
    geometry = list(inspect.signature(family.__init__).parameters)[1:]
    for key in kwargs:
        if key not in geometry:
            raise unknown(f"argument of {name}", key, geometry)
        _check_argument(f"{key} of {name}", key, kwargs[key])
    if not isinstance(pretrained, bool):
        raise UserError(f"pretrained of {name}={pretrained}: expected true or false.")

    model: Any = family(**{**defaults, **kwargs})
    model.weights = asdict(Weights("random"))
    channels, *frames, height, width = model.input_shape
    video = bool(frames)
    if video:  # the registered weights and classes are those of the model for images
        config = {key: value for key, value in config.items() if key not in ("hf_hub_id", "hf_hub_filename")}
    same_classes = not video and model.num_classes == config["num_classes"]
    model.pretrained_cfg = {
        **config,
        "architecture": name,
        "num_classes": model.num_classes,
        "input_size": (channels, height, width),  # of a frame, in a video
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "label_names": label_names(config) if same_classes else None,
    }
    model.default_cfg = model.pretrained_cfg
    any_head = False
    if checkpoint is not None:
        local = not str(checkpoint).startswith("hf://")
        named = _metadata(fetch(str(checkpoint), "")[0], "label_names", str) if local else None
        if named or registered["label_names"] != IMAGENET:
            model.pretrained_cfg["label_names"] = named  # somebody's own classes
    elif pretrained and video:
        raise UserError(
            f"no weights are registered for {name} with num_frames: pass a file's path (backbone.checkpoint=PATH, "
            "create_model(..., checkpoint=PATH)), or take random ones (backbone.pretrained=false, pretrained=False)."
        )
    elif pretrained:
        any_head = True
        checkpoint = _pretrained_file(name, config)
    if checkpoint is not None and not is_meta(model):
        load_weights(model, checkpoint, revision, any_head=any_head)
    if features_only:
        return _feature_extractor(model, out_indices, feature_class)
    return model


def is_meta(model: nn.Module) -> bool:
    """Whether the model is an outline on the meta device, which has no weights."""
    return next(model.parameters()).is_meta


def _pretrained_file(name: str, config: Mapping[str, Any]) -> str:
    """Where a configuration says the weights are: a local file, or one on the hub."""
    if config.get("state_dict") is None:
        if config.get("file"):
            return str(config["file"])
        if config.get("hf_hub_id"):
            return f"hf://{config['hf_hub_id']}/{config.get('hf_hub_filename') or 'model.safetensors'}"
    raise UserError(
        f"pretrained_cfg of {name} names neither a file nor a repository on the Hugging Face Hub (hf_hub_id), from "
        "which alone weights are read: pass checkpoint=FILE, or call load_state_dict on the model."
    )


def _feature_extractor(model: Any, out_indices: int | Sequence[int], feature_class: Any) -> Any:
    """timm's wrapper: images to the maps of ``forward_intermediates``."""
    from timm.models._features import FeatureGetterNet

    if feature_class not in ("getter", FeatureGetterNet):
        raise UserError(f"feature_cls={feature_class}: expected 'getter', for the tokens of a block are no image.")
    extractor: Any = FeatureGetterNet(model, out_indices=tuple(model.blocks_at(out_indices)))
    no_head = ("num_classes", "classifier", "label_names")
    extractor.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in no_head}
    extractor.default_cfg = extractor.pretrained_cfg
    return extractor


def _check_argument(label: str, key: str, value: Any) -> None:
    """Raise a ``UserError`` unless the value is one that a family takes for ``key``."""
    if key in ("stride", "num_frames") and value is None:
        return
    if key in ("drop_path_rate", "drop_rate"):
        check_number(label, value, float, 0, 0.99)
    elif key == "global_pool":
        check_pooling(value)
    elif key == "img_size" and isinstance(value, list | tuple) and len(value) == 2:
        for pixels in value:
            check_number(label, pixels, int, 1)
    else:
        check_number(label, value, int, 0 if key == "num_classes" else 1)


def load_weights(
    model: Any,
    checkpoint: str | Path,
    revision: str = "main",
    whole: nn.Module | None = None,
    *,
    any_head: bool = False,
) -> None:
    """Load a checkpoint strictly, adapted to the model's grid, frames and channels if those are others.

    ``model.fit_weights`` adapts it. Reads safetensors, or a PyTorch file without executing anything in it. If the
    checkpoint is of a task's model, ``whole`` is that, and ``model`` its ``backbone``.

    Args:
        any_head: leave a head for other classes out of the checkpoint, as is done anyway for a model without one.

    Raises:
        UserError: the file is absent or corrupt, or its parameters do not fit (they are listed).
    """
    path, commit = fetch(str(checkpoint), revision)
    state = _read(path)
    prefix = "" if whole is None else "backbone."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    adapted = model.fit_weights(own, _metadata(path, "grid_size", int), f"checkpoint {path}")
    state.update({prefix + key: value for key, value in own.items()})
    if whole is None and "head.weight" in state and (any_head or model.num_classes == 0):
        head = {f"head.{key}": value for key, value in model.head.state_dict().items()}
        if not head or head["head.weight"].shape != state["head.weight"].shape:
            adapted = True
            if head:
                classes = f"{len(state['head.weight'])} classes, the model {model.num_classes}"
                warnings.warn(f"checkpoint {path.name} has {classes}: the head is left untrained.", stacklevel=5)
            state = {key: value for key, value in state.items() if not key.startswith("head.")} | head
    _check(state, whole or model, path)
    (whole or model).load_state_dict(state, strict=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    source = str(checkpoint) if str(checkpoint).startswith("hf://") else path.name
    model.weights = asdict(Weights(source, commit, digest, None if adapted else PUBLISHED_TOP1.get(path.name)))


def checkpoint_label_names(checkpoint: Path) -> tuple[str, ...] | None:
    """The class names a local checkpoint carries, ``None`` if it does not.

    Raises:
        UserError: it is absent or cannot be read.
    """
    return _metadata(fetch(str(checkpoint), "")[0], "label_names", str)


def _metadata(path: Path, key: str, kind: type) -> tuple[Any, ...] | None:
    """The JSON list of strings or integers that a safetensors file carries in its metadata under ``key``."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {}).get(key, "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"cannot read checkpoint {path} and its metadata {key}: {first_line(error)}") from error
    if values is not None and not (isinstance(values, list) and all(isinstance(value, kind) for value in values)):
        raise UserError(f"checkpoint {path}: its metadata {key} is no JSON list of {kind.__name__}.")
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
            # PyTorch's own text advises to execute whatever the file holds, or is what the unpickler stumbled over.
            reason = "it is neither a safetensors file nor a PyTorch checkpoint that holds nothing but tensors."
        raise UserError(f"cannot read checkpoint {path}: {reason}") from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"checkpoint {path} holds no state dict: expected parameter names and tensors.")
    return content


def _check(state: Mapping[str, Tensor], model: nn.Module, path: Path) -> None:
    """Raise a ``UserError`` that lists every parameter that does not fit."""
    expected = model.state_dict()
    wrong = {k: (tuple(state[k].shape), tuple(v.shape)) for k, v in expected.items() if k in state}
    wrong = {k: shapes for k, shapes in wrong.items() if shapes[0] != shapes[1]}
    head = wrong.get("head.weight")
    if head is not None and head[0][1:] == head[1][1:]:
        raise UserError(
            f"checkpoint {path} has {head[0][0]} classes, the model {head[1][0]}: "
            f"create the model with num_classes={head[0][0]} (backbone.num_classes={head[0][0]})."
        )
    problems = [
        *(f"missing {key}" for key in expected.keys() - state.keys()),
        *(f"unexpected {key}" for key in state.keys() - expected.keys()),
        *(f"{key} has shape {found}, expected {wanted}" for key, (found, wanted) in wrong.items()),
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:20])
        more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(f"checkpoint {path} does not fit {type(model).__name__}:\n  {shown}{more}")
