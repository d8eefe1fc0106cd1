"""Depthwise convolution over a grid."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.errors import UserError
from mtr_lab.ops.registry import Implementation, Operation, autocasts, lacks_gradient
from mtr_lab.ops.shapes import check_shapes


def depthwise_conv2d(maps: Tensor, weight: Tensor, bias: Tensor | None = None, *, silu: bool = False) -> Tensor:
    """A convolution of every channel with its own kernel, of stride 1, padded so that the grid keeps its size.

    Differentiable, by the convolution of PyTorch.

    Args:
        maps: (B, E, rows, columns). The kernel for GPUs reads channels-last data without a copy.
        weight: (E, 1, K, K), K odd.
        bias: (E,); ``None`` for none.
        silu: whether SiLU follows.

    Returns:
        (B, E, rows, columns) in the dtype of ``maps``; under autocast on a GPU in that of autocast, as of ``F.conv2d``.

    Raises:
        UserError: shapes that do not match, or an even K.

    Source: Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", arXiv 1610.02357; SiLU of
    Elfwing et al., "Sigmoid-Weighted Linear Units for Neural Network Function Approximation", arXiv 1702.03118.
    """
    if maps.ndim != 4 or weight.ndim != 4 or weight.shape[2] % 2 == 0:
        raise UserError(
            "depthwise_conv2d: expected maps (B, E, rows, columns) and weight (E, 1, K, K) with an odd K, got "
            f"{tuple(maps.shape)} and {tuple(weight.shape)}: reshape them, or pad the weight with zeros to an odd K."
        )
    channels, width = maps.shape[1], weight.shape[2]
    expected = {"weight": (weight, (channels, 1, width, width)), "bias": (bias, (channels,))}
    check_shapes("depthwise_conv2d", f"maps of shape {tuple(maps.shape)}", expected)
    return DEPTHWISE_CONV2D(maps, weight, bias, silu)


def depthwise_conv2d_reference(maps: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """The convolution of PyTorch. Arguments and result as ``depthwise_conv2d``."""
    y = F.conv2d(maps, weight, bias, padding=weight.shape[-1] // 2, groups=maps.shape[1])
    return F.silu(y) if silu else y


def _triton(maps: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    from mtr_lab.ops.gpu import conv_grid

    return conv_grid.convolve(maps, weight, bias, silu=silu)


def _unfit(*inputs: Any) -> str:
    if autocasts() and inputs[0].dtype != torch.get_autocast_dtype("cuda"):
        return "convolves in the dtype of its input, not of autocast"
    return lacks_gradient("a convolution over a grid", *inputs)


def _like_result(maps: Tensor, *inputs: Any) -> Tensor:
    images, channels, rows, columns = maps.shape
    return maps.new_empty(images, rows, columns, channels).permute(0, 3, 1, 2)


DEPTHWISE_CONV2D = Operation(
    "depthwise_conv2d",
    [
        Implementation("triton", _triton, unfit=_unfit, package="triton"),
        Implementation("reference", depthwise_conv2d_reference, composed=True),
    ],
    schema=("Tensor maps, Tensor weight, Tensor? bias, bool silu", "Tensor"),
    fake=_like_result,
    strict=False,
)


@register_flop_formula(torch.ops.mtr_lab.depthwise_conv2d)
def depthwise_conv2d_flops(maps_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    """2 FLOPs per tap, position and channel."""
    images, channels, rows, columns = maps_shape
    return 2 * images * channels * rows * columns * weight_shape[2] * weight_shape[3]
