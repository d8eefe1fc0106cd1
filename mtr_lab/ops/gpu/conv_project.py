"""Convolution over the original positions of a reduced sequence, SiLU and x_proj in one launch.

A program convolves T tokens in one direction, C channels at a time, stores them and multiplies them by the rows of
x_proj. ``conv_unmerged`` and a product of the library write the convolved tokens and read them again.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.formulas import APPROXIMATE, silu_once
from mtr_lab.ops.gpu.occupancy import on_its_device, precision, product, registers, reverse_mask, rows
from mtr_lab.ops.packed import PackedWeights

MIN_TOKENS, WIDTHS = 29_696, (768, 1536)  # tokens and channels for which it was measured to be faster than two launches
TOKENS, CHANNELS, WARPS = 64, 32, 4  # of a program
LOOP_STAGES = 3  # channels are loaded two turns of the loop ahead
REGISTERS = registers(128)


def fits(tokens: int, channels: int, dtype: torch.dtype) -> bool:
    """Whether this form is used."""
    return tokens >= MIN_TOKENS and channels in WIDTHS and dtype != torch.float32


@triton.jit
def _taps(row, image, index, source, step, positions, W: tl.constexpr):
    """For each tap the row that it reads, relative to the first one of the image, and whether there is one."""
    taps, exists = (), ()
    position = tl.load(index + row)
    for k in tl.static_range(W):  # tap W - 1 multiplies the token itself
        near = position - step * (W - 1 - k)
        token = tl.load(source + image * positions + near, (near >= 0) & (near < positions), -1)
        taps = taps + (token.to(tl.int32),)
        exists = exists + (token >= 0,)
    return taps, exists


@triton.jit(do_not_specialize=["tokens", "length", "positions"])
def _convolve_project(x, conv_weight, conv_bias, weight, index, source, u, projected, tokens, length, positions,
                      channels: tl.constexpr, step_x: tl.constexpr, REVERSE: tl.constexpr, G: tl.constexpr,
                      W: tl.constexpr, R: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
                      APPROXIMATE: tl.constexpr, T: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    g = tl.program_id(0)
    first = tl.program_id(1).to(tl.int64) * T
    row = first + tl.arange(0, T)
    row_mask = row < tokens
    row = tl.minimum(row, tokens - 1)
    image = row // length
    step = 1 - 2 * ((REVERSE >> g) & 1)
    taps, exists = _taps(row, image, index, source, step, positions, W)
    start = first // length  # the image of the first token
    x += start * length * step_x
    shift = ((image - start) * length).to(tl.int32)
    out = g * tokens.to(tl.int64) + row
    conv_weight += g * W * channels
    conv_bias += g * channels
    weight += g * channels * (R + S)
    low_rank, b_and_c = tl.zeros((T, R), tl.float32), tl.zeros((T, S), tl.float32)
    r, s = tl.arange(0, R), R + tl.arange(0, S)
    for c0 in tl.range(0, channels, C, num_stages=STAGES):
        c = c0 + tl.arange(0, C)
        mask = c < channels
        total = tl.zeros((T, C), tl.float32) + tl.load(conv_bias + c, mask, 0)[None, :]
        for k in tl.static_range(W):
            at = ((shift + taps[k]) * step_x)[:, None] + c[None, :]
            near = tl.load(x + at, exists[k][:, None] & mask[None, :], 0).to(tl.float32)
            total += near * tl.load(conv_weight + k * channels + c, mask, 0)[None, :]
        active = silu_once(total, APPROXIMATE).to(u.dtype.element_ty)
        tl.store(u + out[:, None] * channels + c[None, :], active, row_mask[:, None] & mask[None, :])
        at = weight + c[:, None] * (R + S)
        low_rank = product(active, tl.load(at + r[None, :], mask[:, None], 0), low_rank, PRECISION)
        b_and_c = product(active, tl.load(at + s[None, :], mask[:, None], 0), b_and_c, PRECISION)
    projected += out[:, None] * (R + S)
    tl.store(projected + r[None, :], low_rank, row_mask[:, None])
    tl.store(projected + s[None, :], b_and_c, row_mask[:, None])


@on_its_device
def convolve_project(
    x: Tensor,
    weights: PackedWeights,
    reverse: Sequence[int],
    index: Tensor,
    source: Tensor,
) -> tuple[Tensor, Tensor]:
    """Convolve the tokens over their original positions and multiply them by x_proj.

    Args:
        x: (B, L, E), copied unless its rows are contiguous and evenly spaced.
        index, source, reverse: as in ``mtr_lab.ops.causal_conv1d``.

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
    _convolve_project[directions, triton.cdiv(images * length, TOKENS)](
        x, weights.conv_weight, weights.conv_bias, weights.projection, index.contiguous(), source.contiguous(), u,
        projected, images * length, length, source.shape[1], channels, x.stride(1), REVERSE=reverse_mask(reverse),
        G=directions, W=width, R=rank, S=both, PRECISION=precision(x.dtype), APPROXIMATE=APPROXIMATE, T=TOKENS,
        C=CHANNELS, STAGES=LOOP_STAGES, num_warps=WARPS, **REGISTERS,
    )  # fmt: skip
    return u, projected
