"""Read objects of the class ``VSSM`` of VMamba's authors: those of the published kind, ``forward_type="v05_noz"``.

A mixer's ``forward`` is set on each object by the authors' constructor, which tells its kind.
"""

import inspect
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from mtr_lab.backbones.foreign import check_methods
from mtr_lab.backbones.keywords import Keyword, only
from mtr_lab.errors import UserError

MIXER: Mapping[str, Keyword] = {
    "disable_z": only(True, otherwise="the mixer has a gate"),
    "oact": only(False, otherwise="an activation follows the norm of the mixer"),
    "with_dconv": only(True, otherwise="the mixer has no convolution over the grid"),
    "scan_mode": only("cross2d", 0, otherwise="the mixer scans along other paths"),
    "forward": only("forwardv2", otherwise="it is another kind of mixer"),
    "act": only("SiLU", otherwise="the mixer has an activation other than SiLU"),
    "out_norm": only("LayerNorm", "LayerNorm2d", otherwise="the mixer has another norm"),
    "dt_rank": only("auto", otherwise="Δ has a rank other than a sixteenth of the width"),
    "bias": only(False, otherwise="the convolution over the grid has a bias"),
    "dropout": only(0, otherwise="the mixer drops some of its output while training"),
}
BLOCK: Mapping[str, Keyword] = {
    "ssm_branch": only(True, otherwise="the block has no mixer"),
    "mlp_branch": only(True, otherwise="the block has no MLP"),
    "post_norm": only(False, otherwise="norms follow the mixer and the MLP"),
    "norm": only("LayerNorm", "LayerNorm2d", otherwise="the block has another norm"),
    "mlp": only(["fc1", "act", "fc2", "drop"], otherwise="the MLP has other parts"),
    "mlp_act": only("GELU(approximate='none')", otherwise="the MLP has an activation other than GELU"),
    "mlp_drop": only(0, otherwise="the MLP drops some of its activations while training"),
}


def read_arguments(model: Any, methods: Iterable[str]) -> dict[str, Any] | None:
    """An object of the authors' class -> the arguments of our constructor; ``None`` for other objects.

    Its blocks have a mixer ``op`` with ``x_proj_weight``, a tensor for all paths.

    Args:
        model: the object.
        methods: those of its class that ours stand for.

    Raises:
        UserError: a variant that is not represented.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(model, "classifier"):
        return None
    blocks = [list(getattr(layer, "blocks", ())) for layer in layers]
    if not all(stage and all(hasattr(getattr(b, "op", None), "x_proj_weight") for b in stage) for stage in blocks):
        return None
    name = type(model).__name__
    check_methods(model, methods)
    if len(inspect.signature(type(model).forward).parameters) != 2:
        raise UserError(f"{name}.forward takes more than images: mtr_lab computes what the authors' own class does.")
    if getattr(model, "pos_embed", None) is not None:
        raise UserError(f"the position embeddings (pos_embed) of {name} are not represented: use the authors' code.")
    for number, layer in enumerate(blocks):
        for place, block in enumerate(layer):
            where = f"layers.{number}.blocks.{place}"
            _check(f"{where} of {name}", _of_block(block), BLOCK)
            _check(f"{where}.op of {name}", _of_mixer(block.op), MIXER)
    first, last = blocks[0][0], blocks[-1][-1]
    width, inner = last.op.out_proj.weight.shape[:2]  # of the widest stage, where rounding down hides least
    return {
        "dims": tuple(layer[0].op.out_proj.weight.shape[0] for layer in blocks),
        "depths": tuple(map(len, blocks)),
        "ssm_ratio": _ratio(inner, width),
        "ssm_d_state": first.op.A_logs.shape[1],
        "mlp_ratio": _ratio(last.mlp.fc1.weight.shape[0], width),
        "channels": model.patch_embed[0].in_channels,
        "num_classes": getattr(model.classifier.head, "out_features", 0),
        "drop_path_rate": _rate(last.drop_path),
        "use_checkpoint": bool(getattr(last, "use_checkpoint", False)),
    }


def _check(where: str, attributes: Mapping[str, Any], keywords: Mapping[str, Keyword]) -> None:
    for key, value in attributes.items():
        keywords[key].check(f"{key}={value!r} of {where}", value, "Only the authors' code computes that")


def _of_block(block: Any) -> dict[str, Any]:
    """Of a block, by the names in ``BLOCK``."""
    if not hasattr(block, "mlp"):
        return {"mlp_branch": False}
    return {
        "ssm_branch": block.ssm_branch,
        "mlp_branch": block.mlp_branch,
        "post_norm": block.post_norm,
        "norm": type(block.norm).__name__,
        "mlp": list(block.mlp._modules),
        "mlp_act": repr(getattr(block.mlp, "act", None)),
        "mlp_drop": _rate(getattr(block.mlp, "drop", None)),
    }


def _of_mixer(mixer: Any) -> dict[str, Any]:
    """Of a mixer, by the names in ``MIXER``."""
    forward, core = vars(mixer).get("forward"), vars(mixer).get("forward_core")
    rank, width = mixer.dt_projs_weight.shape[2], mixer.out_proj.weight.shape[0]
    settings = core.keywords if isinstance(core, partial) else {}
    return {
        "forward": getattr(forward.func if isinstance(forward, partial) else forward, "__name__", None),
        "disable_z": getattr(mixer, "disable_z", False),
        "oact": getattr(mixer, "oact", False),
        "with_dconv": getattr(mixer, "with_dconv", True),
        "scan_mode": settings.get("scan_mode", "cross2d"),
        "act": type(mixer.act).__name__,
        "out_norm": type(mixer.out_norm).__name__,
        "dt_rank": "auto" if rank == math.ceil(width / 16) else rank,
        "bias": mixer.conv2d.bias is not None,
        "dropout": _rate(getattr(mixer, "dropout", None)),
    }


def _ratio(inner: int, width: int) -> float:
    """The ratio of which the constructor rounds ``ratio * width`` down to ``inner``."""
    return inner / width * (1 + 1e-9)


def _rate(module: Any) -> float:
    """The rate of a ``Dropout`` or ``DropPath``, 0 without one."""
    return float(getattr(module, "p", getattr(module, "drop_prob", None)) or 0)
