"""The convolution of a reduced sequence over its original positions, where merged tokens still stand in every place.

Only the outputs of the tokens are computed: each reads its neighbours by index, and nothing is unmerged in memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.ops.registry import Implementation, Operation


def causal_conv1d_unmerged_reference(
    x: Tensor, weight: Tensor, bias: Tensor, index: Tensor, source: Tensor, reverse: Sequence[int]
) -> Tensor:
    """A sum of W products with gathered tokens in plain PyTorch. Arguments and result as ``causal_conv1d``."""
    width, positions = weight.shape[-1], source.shape[1]
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    near = index[..., None] + torch.arange(1 - width, width, device=x.device)  # (B, L, 2W - 1)
    token = source.gather(1, near.clamp(0, positions - 1).flatten(1)).view_as(near)
    absent = (near < 0) | (near >= positions) | (token < 0)
    rows = [take_rows(x, token[..., d].clamp(min=0)).masked_fill(absent[..., d, None], 0) for d in range(2 * width - 1)]
    outputs = []
    for g, backward in enumerate(reverse):
        taps = weight[g].flip(-1) if backward else weight[g]  # (E, W), in the order of positions
        read = rows[width - 1 :] if backward else rows[:width]
        outputs.append(F.silu(bias[g] + sum(row * taps[:, k] for k, row in enumerate(read))))
    return torch.stack(outputs)


def take_rows(x: Tensor, positions: Tensor) -> Tensor:
    """x (..., L, E) at positions (..., M): (..., M, E)."""
    return x.gather(-2, positions[..., None].expand(*positions.shape, x.shape[-1]))


def causal_conv1d_unmerged_triton(
    x: Tensor, weight: Tensor, bias: Tensor, index: Tensor, source: Tensor, reverse: Sequence[int]
) -> Tensor:
    """One kernel for all directions. Arguments and result as ``causal_conv1d``."""
    from mtr_lab.ops.gpu import conv_unmerged

    return conv_unmerged.convolve(x, weight.float().mT.contiguous(), bias.float(), index, source, reverse)


def _unmerged_cpu(*inputs: Any) -> Tensor:
    from mtr_lab.ops.cpu import convolution

    return convolution.causal_conv1d_unmerged(*inputs)


CAUSAL_CONV1D_UNMERGED = Operation(
    "causal_conv1d_unmerged",
    [
        Implementation("triton", causal_conv1d_unmerged_triton, package="triton"),
        Implementation("cpu", _unmerged_cpu),
        Implementation("reference", causal_conv1d_unmerged_reference),
    ],
    schema=("Tensor x, Tensor weight, Tensor bias, Tensor index, Tensor source, int[] reverse", "Tensor"),
    fake=lambda x, weight, bias, index, source, reverse: x.new_empty(weight.shape[0], *x.shape),
)


@register_flop_formula(torch.ops.mtr_lab.causal_conv1d_unmerged)
def causal_conv1d_unmerged_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """2 FLOPs per tap, token, channel and direction: those of a convolution of the tokens alone."""
    directions, _, width = weight_shape
    batch, length, channels = x_shape
    return 2 * directions * batch * length * channels * width
