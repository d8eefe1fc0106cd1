"""The weights of a mixer in a training step: packed for the kernels in one launch, their gradients added up in one.

A program packs or adds one row of one weight: a few channels of one tap, rank, state or bias, of one direction.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.formulas import LOG2E
from mtr_lab.ops.gpu.occupancy import on_its_device
from mtr_lab.ops.packed import MambaWeights, PackedWeights, padded_sizes

CHANNELS = 64  # of a program
PARTS = 32  # rows that a program loads at a time


@triton.jit
def _pack(fields, packed, channels, rank: tl.constexpr, states: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
          N: tl.constexpr, G: tl.constexpr, E: tl.constexpr):  # fmt: skip
    row = tl.program_id(1)
    e = tl.program_id(0) * E + tl.arange(0, E)
    mask = e < channels
    for g in tl.static_range(G):
        if tl.program_id(2) == g:
            if row < W:
                x = tl.load(fields[0][g] + e * W + row, mask, 0).to(tl.float32)
                tl.store(packed[0] + (g * W + row) * channels + e, x, mask)
            row -= W
            if (row >= 0) & (row < R + 2 * N):
                state = (row - R) % N
                source = tl.where(row < R, row, rank + (row - R) // N * states + state)
                exists = tl.where(row < R, row < rank, state < states)
                x = tl.load(fields[2][g] + source * channels + e, mask & exists, 0)
                tl.store(packed[2] + (g * channels + e) * (R + 2 * N) + row, x.to(packed[2].dtype.element_ty), mask)
            row -= R + 2 * N
            if (row >= 0) & (row < R):
                x = tl.load(fields[3][g] + e * rank + row, mask & (row < rank), 0)
                tl.store(packed[3] + (g * R + row) * channels + e, x.to(packed[3].dtype.element_ty), mask)
            row -= R
            if (row >= 0) & (row < N):
                x = tl.load(fields[5][g] + e * states + row, mask & (row < states), 0).to(tl.float32)
                x = tl.where(row < states, -tl.exp2(x * LOG2E), 0)
                tl.store(packed[5] + (g * N + row) * channels + e, x, mask)
            if row == N:
                tl.store(packed[1] + g * channels + e, tl.load(fields[1][g] + e, mask, 0).to(tl.float32), mask)
                tl.store(packed[4] + g * channels + e, tl.load(fields[4][g] + e, mask, 0).to(tl.float32), mask)
                tl.store(packed[6] + g * channels + e, tl.load(fields[6][g] + e, mask, 0).to(tl.float32), mask)


@on_its_device
def pack(xz: Tensor, weights: MambaWeights) -> PackedWeights:
    """``mtr_lab.ops.pack(weights, xz.dtype)``."""
    fields = tuple(tuple(p.contiguous() for p in (f.unbind() if isinstance(f, Tensor) else f)) for f in weights)
    directions, channels = len(fields[0]), fields[0][0].shape[0]
    width = fields[0][0].shape[-1]
    rank, states = padded_sizes(weights)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return xz.new_empty(directions, *shape, dtype=dtype)

    packed = PackedWeights(
        empty(width, channels), empty(channels), empty(channels, rank + 2 * states, dtype=xz.dtype),
        empty(rank, channels, dtype=xz.dtype), empty(channels), empty(states, channels), empty(channels),
    )  # fmt: skip
    rows = width + rank + 2 * states + rank + states + 1
    _pack[triton.cdiv(channels, CHANNELS), rows, directions](
        fields, tuple(packed), channels, weights.rank, weights.states, W=width, R=rank, N=states, G=directions,
        E=CHANNELS, num_warps=1,
    )  # fmt: skip
    return packed


class Parts(NamedTuple):
    """The parts of the gradients of a mixer's weights, float32; P is the number of parts, of each its own."""

    conv: Tensor
    """(P, G, W + 1, E): of the taps, then of the bias."""
    projection: Tensor
    """(P, G, R + 2N, E)."""
    timescale: Tensor
    """(P, G, rank, E)."""
    timescale_bias: Tensor
    """(G, P, E)."""
    a: Tensor
    """(G, P, N / 4, blocks, c, threads, 4): four states of a channel are side by side, channel c · thread + i of a
    block is in [i, thread]."""
    d: Tensor
    """(G, P, E)."""


@triton.jit
def _total(x, parts, stride, at, mask, T: tl.constexpr):
    """The sum of x at offsets ``at`` over parts."""
    total = tl.zeros((T, at.shape[0]), tl.float32)
    for first in range(0, parts, T):
        part = first + tl.arange(0, T)
        total += tl.load(x + (part * stride)[:, None] + at[None, :], (part < parts)[:, None] & mask[None, :], 0)
    return tl.sum(total, 0)


@triton.jit
def _add(parts, counts, a, grads, channels, rank: tl.constexpr, states: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
         N: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr, E: tl.constexpr, T: tl.constexpr):  # fmt: skip
    row, g, groups = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    e = tl.program_id(0) * E + tl.arange(0, E)
    mask = e < channels
    if row <= W:
        stride = groups * (W + 1) * channels
        x = _total(parts[0], counts[0], stride, (g * (W + 1) + row) * channels + e, mask, T)
        if row < W:
            tl.store(grads[0] + (g * channels + e) * W + row, x, mask)
        else:
            tl.store(grads[1] + g * channels + e, x, mask)
    row -= W + 1
    if (row >= 0) & (row < rank + 2 * states):
        source = tl.where(row < rank, row, R + (row - rank) // states * N + (row - rank) % states)
        stride = groups * (R + 2 * N) * channels
        x = _total(parts[1], counts[1], stride, (g * (R + 2 * N) + source) * channels + e, mask, T)
        tl.store(grads[2] + (g * (rank + 2 * states) + row) * channels + e, x, mask)
    row -= rank + 2 * states
    if (row >= 0) & (row < rank):
        x = _total(parts[2], counts[2], groups * rank * channels, (g * rank + row) * channels + e, mask, T)
        tl.store(grads[3] + (g * channels + e) * rank + row, x, mask)
    row -= rank
    if (row >= 0) & (row < states):
        blocks = tl.cdiv(channels, C * LANES)
        stride = N * blocks * C * LANES
        at = (e // (C * LANES) * C + e % C) * LANES + e // C % LANES
        at = (row // 4 * blocks * (C * LANES) + at) * 4 + row % 4
        x = _total(parts[4] + g.to(tl.int64) * counts[4] * stride, counts[4], stride, at, mask, T)
        x *= tl.load(a + (g * N + row) * channels + e, mask, 0)
        tl.store(grads[5] + (g * channels + e) * states + row, x, mask)
    if row == states:
        x = _total(parts[3] + g * counts[3] * channels, counts[3], channels, e, mask, T)
        tl.store(grads[4] + g * channels + e, x, mask)
    if row == states + 1:
        x = _total(parts[5] + g * counts[5] * channels, counts[5], channels, e, mask, T)
        tl.store(grads[6] + g * channels + e, x, mask)


@on_its_device
def add_parts(parts: Parts, a: Tensor, rank: int, states: int) -> tuple[Tensor, ...]:
    """The gradients of the parameters in float32, one tensor (G, *) for each field of ``MambaWeights``.

    Args:
        a: of the packed weights, the factor between the gradients of A and A_log.
        rank, states: of the parameters, unpadded.
    """
    _, directions, taps, channels = parts.conv.shape
    padded_states = a.shape[1]
    shapes = (channels, 1, taps - 1), (channels,), (rank + 2 * states, channels), (channels, rank), (channels,)
    grads = tuple(a.new_empty(directions, *s) for s in (*shapes, (channels, states), (channels,)))
    counts = tuple(t.shape[i] for t, i in zip(parts, (0, 0, 0, 1, 1, 1), strict=True))
    rows = taps + rank + 2 * states + rank + states + 2
    _add[triton.cdiv(channels, CHANNELS), rows, directions](
        tuple(parts), counts, a, grads, channels, rank, states, W=taps - 1,
        R=parts.projection.shape[2] - 2 * padded_states, N=padded_states, C=parts.a.shape[4], LANES=parts.a.shape[5],
        E=CHANNELS, T=PARTS, num_warps=4,
    )  # fmt: skip
    return grads
