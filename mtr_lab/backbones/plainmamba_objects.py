"""Read objects of the class ``PlainMamba`` of its authors: a backbone, whose classifier is another module around it."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from mtr_lab.backbones.foreign import check_methods
from mtr_lab.backbones.keywords import Keyword
from mtr_lab.errors import UserError


def read_arguments(model: Any, family: Any) -> dict[str, Any] | None:
    """The arguments of our constructor, for a model without a head; ``None`` for an object of another class.

    Its mixers have ``direction_Bs``.

    Args:
        model: the object.
        family: our class, whose ``keywords`` are those of ``mtr_lab.backbones.keywords``.

    Raises:
        UserError: a variant that is not represented.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return None
    if not all(hasattr(getattr(layer, "mamba", None), "direction_Bs") for layer in layers):
        return None
    name, keywords, depth = type(model).__name__, family.keywords, len(layers)
    check_methods(model, family.stands_for)
    if len(inspect.signature(type(model).forward).parameters) != 2:
        raise UserError(f"{name}.forward takes more than images: mtr_lab computes what the authors' own class does.")
    if list(model.out_indices) != [depth - 1]:
        raise UserError(
            f"out_indices={list(model.out_indices)} of {name} is not represented: expected [{depth - 1}], the last "
            "block alone. Use forward_intermediates of a model of mtr_lab.create_model for others."
        )
    if model.drop_after_pos.p > 0:
        raise UserError(
            f"drop_after_pos of {name} drops {model.drop_after_pos.p:g}, which is not represented: set p = 0."
        )
    padding = getattr(model.patch_embed.adaptive_padding, "padding", None)
    if padding != "corner":
        raise UserError(f"patch_embed of {name} pads by {padding!r}, which is not represented: expected 'corner'.")
    for key in ("with_pos_embed", "final_norm", "interpolate_mode"):
        _check(name, keywords, key, getattr(model, key))
    for number, layer in enumerate(layers):
        where = f"layers.{number} of {name}"
        _check(where, keywords, "use_rms_norm", not isinstance(layer.norm, nn.LayerNorm))
        for key, value in _of_mixer(layer.mamba).items():
            _check(where, keywords, key, value)
    embed = model.patch_embed
    first: Any = layers[0].mamba
    return {
        "img_size": tuple(embed.init_input_size),
        "patch_size": 2 * embed.projection.kernel_size[0],
        "stride": 2 * embed.projection.stride[0],
        "depth": depth,
        "embed_dim": embed.projection.out_channels,
        "d_state": first.A_log.shape[1],
        "conv_size": first.conv2d.kernel_size[0],
        "num_convs_patch_embed": len(embed.convs or ()) // 3,
        "layers_with_dwconv": [number for number, layer in enumerate(layers) if layer.with_dwconv],
        "channels": embed.stem[0].in_channels,
        "num_classes": 0,
        "drop_path_rate": float(getattr(layers[-1].drop_path, "drop_prob", None) or 0),
    }


def copy_settings(model: Any, ours: nn.Module) -> None:
    """Give our norms the numbers that are attributes of the object's: epsilon, and momentum of batch norms."""
    theirs = dict(model.named_modules())
    for name, module in ours.named_modules():
        for setting in ("eps", "momentum"):
            if hasattr(module, setting):
                setattr(module, setting, getattr(theirs[name], setting))


def _of_mixer(mixer: Any) -> dict[str, Any]:
    """Of a mixer, by the names of the authors' keywords."""
    rank = mixer.dt_rank
    return {
        "expand": mixer.expand,
        "dt_rank": "auto" if rank == math.ceil(mixer.d_model / 16) else rank,
        "bias": mixer.in_proj.bias is not None,
        "conv_bias": mixer.conv2d.bias is not None,
        "init_layer_scale": mixer.init_layer_scale,
    }


def _check(where: str, keywords: Mapping[str, Keyword], key: str, value: Any) -> None:
    keywords[key].check(f"{key}={value!r} of {where}", value, "Only the authors' code computes that")
