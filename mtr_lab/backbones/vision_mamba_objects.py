"""Read objects of the classes that the authors of Vim, of VideoMamba and of Mamba-Reg call ``VisionMamba``.

The three have the same class name and almost the same parameter names: attributes tell them apart.
Defaults of their constructors have changed over time, so everything is read from the object.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mtr_lab.backbones.foreign import check_methods
from mtr_lab.backbones.keywords import Keyword
from mtr_lab.errors import UserError

OPTIONS = {"return_features", "inference_params", "if_random_cls_token_position", "if_random_token_rank"}
"""The arguments of the authors' ``forward`` besides the images."""


def has_registers(model: nn.Module) -> bool:
    """Whether an object has attributes of Mamba-Reg's class."""
    return any(hasattr(model, name) for name in ("num_cls_tokens", "cls_positions", "token_idx"))


def mixers_of(model: nn.Module, *, registers: bool = False) -> list[Any]:
    """The mixers of an object with the authors' tree of modules, none of another object.

    Args:
        registers: of objects with registers, or of those without.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(getattr(model, "patch_embed", None), nn.Module):
        return []
    if has_registers(model) != registers:
        return []
    mixers = [getattr(layer, "mixer", None) for layer in layers]
    return mixers if all(isinstance(mixer, nn.Module) and hasattr(mixer, "A_log") for mixer in mixers) else []


def read_arguments(model: Any, family: Any) -> dict[str, Any]:
    """The arguments of our constructor: geometry, classes, rates.

    Args:
        model: the object.
        family: our class, whose ``keywords`` are those of ``mtr_lab.backbones.keywords``.

    Raises:
        UserError: a variant that is not represented.
    """
    name, keywords = type(model).__name__, family.keywords
    check_methods(model, family.stands_for)
    _check_signature(model)
    _check_variant(name, _attributes(model, keywords), keywords)
    for number, layer in enumerate(model.layers):
        _check_variant(f"layers.{number} of {name}", _mixer_attributes(layer, keywords), keywords)
    if (rate := _rate(model, "pos_drop")) > 0:
        raise UserError(
            f"pos_drop of {name} drops {rate:g} of the embedding while training, which is not represented: set "
            "model.pos_drop.p = 0 first."
        )
    proj, img_size = model.patch_embed.proj, model.patch_embed.img_size
    if not isinstance(proj, nn.Conv2d | nn.Conv3d):
        raise UserError(f"patch_embed.proj of {name} is {type(proj).__name__}, expected a convolution: merge adapters.")
    (*depths, height, width), (*steps, down, across) = proj.kernel_size, proj.stride
    if height != width or down != across or depths != steps or any(proj.padding) or proj.groups != 1:
        raise UserError(f"patch_embed.proj of {name} is {proj}: expected square patches, and no padding or groups.")
    frames: dict[str, Any] = {}
    if depths:
        frames = {"num_frames": model.temporal_pos_embedding.shape[1] * depths[0], "kernel_size": depths[0]}
    return {
        "img_size": img_size if isinstance(img_size, int) else tuple(img_size),
        "patch_size": height,
        "stride": down,
        "depth": len(model.layers),
        "embed_dim": proj.out_channels,
        "d_state": model.layers[0].mixer.A_log.shape[1],
        "channels": proj.in_channels,
        "num_classes": model.head.out_features if hasattr(model.head, "out_features") else 0,
        "drop_path_rate": _rate(model, "drop_path"),
        "drop_rate": _rate(model, "head_drop"),
        **frames,
    }


def copy_epsilons(model: Any, ours: Any) -> None:
    """Give each of our norms the epsilon of the object's."""
    norms = [(model.norm_f, ours.norm_f)]
    norms += [(layer.norm, block.norm) for layer, block in zip(model.layers, ours.layers, strict=True)]
    for norm, our_norm in norms:
        if our_norm.eps != norm.eps:
            our_norm.eps = norm.eps


def _attributes(model: Any, keywords: Mapping[str, Keyword]) -> dict[str, Any]:
    """Of the model, by the names of the authors' keywords: its attributes, checked against its parameters."""
    given = {key: getattr(model, key) for key in keywords if hasattr(model, key)}
    double = hasattr(model, "cls_token_head")
    return {
        **given,
        "rms_norm": not isinstance(model.norm_f, nn.LayerNorm),
        "if_cls_token": given.get("if_cls_token", True) and (hasattr(model, "cls_token") or double),
        "use_double_cls_token": given.get("use_double_cls_token", False) or double,
        "if_abs_pos_embed": given.get("if_abs_pos_embed", True) and hasattr(model, "pos_embed"),
        "if_rope": given.get("if_rope", False) or hasattr(model, "rope"),
    }


def _mixer_attributes(layer: Any, keywords: Mapping[str, Keyword]) -> dict[str, Any]:
    """Of a layer and its mixer, by the names of the authors' keywords."""
    mixer = layer.mixer
    attributes = {key: getattr(mixer, key) for key in keywords if hasattr(mixer, key) and key != "if_devide_out"}
    if attributes.get("dt_rank") == math.ceil(mixer.out_proj.out_features / 16):
        attributes["dt_rank"] = "auto"
    return {
        **attributes,
        "rms_norm": not isinstance(layer.norm, nn.LayerNorm),
        "bias": isinstance(getattr(mixer.in_proj, "bias", None), Tensor),  # a method of quantised layers
        "conv_bias": getattr(mixer.conv1d, "bias", None) is not None,
    }


def _check_variant(where: str, attributes: Mapping[str, Any], keywords: Mapping[str, Keyword]) -> None:
    for key in attributes.keys() & keywords.keys():
        value = attributes[key]
        keywords[key].check(f"{key}={value!r} of {where}", value, "Only the authors' code computes that")


def _check_signature(model: nn.Module) -> None:
    """Raise a ``UserError`` unless the arguments of ``forward`` are those of the authors' code."""
    arguments = list(inspect.signature(type(model).forward).parameters.values())[2:]  # without self and the images
    unknown = [argument.name for argument in arguments if argument.kind is argument.POSITIONAL_OR_KEYWORD]
    if unknown := [name for name in unknown if name not in OPTIONS]:
        raise UserError(
            f"{type(model).__name__}.forward has the argument {unknown[0]}, which the authors' classes lack: mtr_lab "
            "computes what these do, and no other."
        )


def _rate(model: nn.Module, name: str) -> float:
    """The rate of a ``Dropout`` or ``DropPath``, 0 without one."""
    module = getattr(model, name, None)
    return float(getattr(module, "p", getattr(module, "drop_prob", None)) or 0)
