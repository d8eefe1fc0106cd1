"""Convolution of neighbouring tokens, SiLU and x_proj in one launch.

A program convolves some runs of neighbouring tokens of an image in one direction, C channels at a time. A thread has
all tokens of a run for its channels, so that each is loaded once for all taps. The results are stored and multiplied by
x_proj.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.formulas import APPROXIMATE, silu_once
from mtr_lab.ops.gpu.occupancy import (
    on_its_device,
    precision,
    product,
    registers,
    reverse_mask,
    rows,
    stack,
    unstack,
)
from mtr_lab.ops.packed import PackedWeights

MIN_TOKENS = 25_216  # 128 images of 197 tokens: with fewer, two launches are often as fast (768 channels)
LOOP_STAGES = 2  # channels are loaded a turn of the loop ahead


class Tile(NamedTuple):
    """What a program computes."""

    runs: int
    window: int
    """The tokens that one run reads at most, a power of two."""
    channels: int
    """Channels at a time."""
    warps: int
    registers: int
    """Of a thread, at most."""


TILES = {384: Tile(2, 32, 128, 4, 128), 768: Tile(1, 64, 256, 4, 255), 1536: Tile(8, 16, 64, 8, 128)}
"""By the number of channels, for which this form was measured to be faster than two launches (256 × 197 tokens)."""


def fits(tokens: int, channels: int, dtype: torch.dtype) -> bool:
    """Whether this form is used."""
    return tokens >= MIN_TOKENS and channels in TILES and dtype != torch.float32


@triton.jit(do_not_specialize=["images", "length"])
def _convolve_window(x, conv_weight, conv_bias, weight, u, projected, images, length, channels: tl.constexpr,
                     step_x: tl.constexpr, REVERSE: tl.constexpr, G: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
                     S: tl.constexpr, PRECISION: tl.constexpr, APPROXIMATE: tl.constexpr, RUN: tl.constexpr,
                     H: tl.constexpr, T: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """H runs of RUN tokens; a vector has the C channels of each run. The last runs of an image may overlap."""
    g = tl.program_id(0)
    tiles = tl.cdiv(length, RUN * H)
    image = (tl.program_id(1) // tiles).to(tl.int64)
    run = tl.program_id(1) % tiles * H
    backward = (REVERSE >> g) & 1
    start = (g * images.to(tl.int64) + image) * length
    column = tl.arange(0, H * C)
    first = tl.minimum((run + column // C) * RUN, length - RUN)
    row = tl.arange(0, T)[:, None] + (first - (1 - backward) * (W - 1))[None, :]  # the windows
    exists = (row >= 0) & (row < length)
    at_x = row * step_x
    x += image * length * step_x
    u += start * channels
    conv_weight += g * W * channels
    conv_bias += g * channels
    weight += g * channels * (R + S)
    low_rank, b_and_c = tl.zeros((H * T, R), tl.float32), tl.zeros((H * T, S), tl.float32)
    r, s = tl.arange(0, R), R + tl.arange(0, S)
    for c0 in tl.range(0, channels, C, num_stages=STAGES):
        e = c0 + column % C
        mask = e < channels
        window = unstack(tl.load(x + at_x + e[None, :], exists & mask[None, :], 0), T)
        bias = tl.load(conv_bias + e, mask, 0)
        taps = ()
        for k in tl.static_range(W):  # in the order of the window
            tap = backward * (W - 1 - 2 * k) + k
            taps = taps + (tl.load(conv_weight + tap * channels + e, mask, 0),)
        active = ()
        for t in tl.static_range(RUN):
            total = bias
            for k in tl.static_range(W):
                total += taps[k] * window[t + k].to(tl.float32)
            active = active + (silu_once(total, APPROXIMATE).to(u.dtype.element_ty),)
            tl.store(u + first * channels + e + t * channels, active[t], mask)
        for _ in tl.static_range(T - RUN):
            active = active + (tl.zeros((H * C,), u.dtype.element_ty),)
        tokens = tl.reshape(tl.permute(tl.reshape(stack(active, T), (T, H, C)), (1, 0, 2)), (H * T, C))
        c = c0 + tl.arange(0, C)
        at = weight + c[:, None] * (R + S)
        low_rank = product(tokens, tl.load(at + r[None, :], (c < channels)[:, None], 0), low_rank, PRECISION)
        b_and_c = product(tokens, tl.load(at + s[None, :], (c < channels)[:, None], 0), b_and_c, PRECISION)
    token = tl.arange(0, H * T)
    t = token % T
    out = projected + (start + tl.minimum((run + token // T) * RUN, length - RUN) + t)[:, None] * (R + S)
    tl.store(out + r[None, :], low_rank, (t < RUN)[:, None])
    tl.store(out + s[None, :], b_and_c, (t < RUN)[:, None])


@on_its_device
def convolve_window(x: Tensor, weights: PackedWeights, reverse: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Convolve neighbouring tokens and multiply them by x_proj.

    Compiled for each length of a run, of which there are at most as many as a window has tokens.

    Args:
        x: (B, L, E), E in ``TILES``; copied unless its rows are contiguous and evenly spaced.
        reverse: for each of the G directions, whether it reads from the last token to the first.

    Returns:
        u: (G, B, L, E) in the dtype of ``x``.
        projected: low rank, B and C side by side, (G, B, L, R + 2N) float32.
    """
    x = rows(x)
    images, length, channels = x.shape
    directions, width, _ = weights.conv_weight.shape
    rank, both = weights.timescale.shape[1], 2 * weights.a.shape[1]
    u = x.new_empty(directions, images, length, channels)
    projected = weights.a.new_empty(directions, images, length, rank + both)
    tile = TILES[channels]
    run = triton.cdiv(length, tile.runs * triton.cdiv(length, tile.runs * (tile.window - width + 1)))
    _convolve_window[directions, images * triton.cdiv(length, run * tile.runs)](
        x, weights.conv_weight, weights.conv_bias, weights.projection, u, projected, images, length, channels,
        x.stride(1), REVERSE=reverse_mask(reverse), G=directions, W=width, R=rank, S=both, PRECISION=precision(x.dtype),
        APPROXIMATE=APPROXIMATE, RUN=run, H=tile.runs, T=tile.window, C=tile.channels, STAGES=LOOP_STAGES,
        num_warps=tile.warps, **registers(tile.registers),
    )  # fmt: skip
    return u, projected
