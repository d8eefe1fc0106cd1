"""Depthwise causal convolution over the original positions of a reduced sequence, and SiLU, in one launch.

A program computes a tile of tokens and channels. It reads the tokens at the 2W - 1 positions around each of its tokens
by index, once for all directions.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.formulas import silu
from mtr_lab.ops.gpu.occupancy import on_its_device, reverse_mask, rows

TOKENS, CHANNELS, WARPS = 8, 128, 4  # of a program


@on_its_device
def convolve(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor, source: Tensor, reverse: Sequence[int]) -> Tensor:
    """``causal_conv1d_unmerged_reference`` for float32, float16 or bfloat16 data, accumulated in float32.

    Args:
        x: (B, L, E), copied unless its rows are contiguous and evenly spaced.
        weight: (G, W, E) float32, contiguous.
        bias: (G, E) float32, contiguous.
        index, source, reverse: as in ``mtr_lab.ops.causal_conv1d``.

    Returns:
        (G, B, L, E) in the dtype of ``x``.
    """
    x = rows(x)
    images, length, channels = x.shape
    directions, width, _ = weight.shape
    y = x.new_empty(directions, images, length, channels)
    _convolve_unmerged[triton.cdiv(channels, CHANNELS), triton.cdiv(length, TOKENS), images](
        x, weight, bias, index.contiguous(), source.contiguous(), y, length, source.shape[1], channels, x.stride(1),
        REVERSE=reverse_mask(reverse), G=directions, W=width, T=TOKENS, E=CHANNELS, num_warps=WARPS,
    )  # fmt: skip
    return y


@triton.jit
def _add_tap(total, x_d, taps, mask, channels: tl.constexpr, D: tl.constexpr, BACKWARD: tl.constexpr, W: tl.constexpr):
    """Add the product of the tokens W - 1 - D positions before, if a tap of the direction reads them."""
    TAP: tl.constexpr = 2 * W - 2 - D if BACKWARD else D  # tap W - 1 multiplies the token itself
    if TAP < W:
        total += tl.load(taps + TAP * channels, mask, 0)[None, :] * x_d
    return total


@triton.jit(do_not_specialize=["length", "positions"])
def _convolve_unmerged(x, weight, bias, index, source, y, length, positions, channels: tl.constexpr,
                       step_x: tl.constexpr, REVERSE: tl.constexpr, G: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
                       E: tl.constexpr):  # fmt: skip
    image, images = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    t = tl.program_id(1) * T + tl.arange(0, T)
    e = tl.program_id(0) * E + tl.arange(0, E)
    row_mask, channel_mask = t < length, e < channels
    position = tl.load(index + image * length + t, row_mask, 0)
    x += image * length * step_x
    totals = ()
    for g in tl.static_range(G):
        shift = tl.load(bias + g * channels + e, channel_mask, 0)
        totals = totals + (tl.zeros((T, E), tl.float32) + shift[None, :],)
    for d in tl.static_range(2 * W - 1):
        near = position + (d - W + 1)
        token = tl.load(source + image * positions + near, row_mask & (near >= 0) & (near < positions), -1)
        at = x + token[:, None] * step_x + e[None, :]
        x_d = tl.load(at, (token >= 0)[:, None] & channel_mask[None, :], 0).to(tl.float32)
        more = ()
        for g in tl.static_range(G):
            taps = weight + g * W * channels + e
            more = more + (_add_tap(totals[g], x_d, taps, channel_mask, channels, d, (REVERSE >> g) & 1, W),)
        totals = more
    mask = row_mask[:, None] & channel_mask[None, :]
    for g in tl.static_range(G):
        active = silu(totals[g])
        out = y + (g * images + image) * length * channels + t[:, None] * channels + e[None, :]
        tl.store(out, active.to(y.dtype.element_ty), mask)
