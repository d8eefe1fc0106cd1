"""The Mamba mixer without in_proj and out_proj."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mtr_lab.ops.cpu.arrays import NO_FACTOR, NO_GAP, NO_POSITIONS, add_blocks, array, memory_of, raster, rows, whole
from mtr_lab.ops.cpu.convolution import conv
from mtr_lab.ops.cpu.scan import scan
from mtr_lab.ops.cpu.scan_statistics import numbers, with_terms
from mtr_lab.ops.cpu.threads import run
from mtr_lab.ops.cpu.vectors import BLOCK
from mtr_lab.ops.onednn import linear
from mtr_lab.ops.packed import PackedWeights

_CACHED = 4 * 2**20  # bytes that convolved tokens may take, on few threads


def mamba_inner(
    xz: Tensor,
    weights: PackedWeights,
    gap: Tensor | None,
    delta_scale: Tensor | None,
    repeats: Tensor | None,
    index: Tensor | None,
    source: Tensor | None,
    reverse: Sequence[int],
    rank: int,
    states: int,
    stats: Sequence[str],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the sums, and low-rank Δ, B and C of the operator ``mtr_lab::mamba_inner``, in float32 or bfloat16.

    A few images at a time: for the convolved tokens of all images the operating system would hand out new memory at
    every call, which took a third of the time.
    """
    images, length, channels = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    directions = len(reverse)
    y = xz.new_empty(images, length, channels)
    projected = torch.empty(directions, images, length, weights.projection.shape[2])
    sums = torch.empty(directions, images, length, len(stats))
    x, z = xz.chunk(2, dim=-1)
    low_rank, b, c = weights.split(projected)
    order, flags = raster(length, tuple(reverse)), np.array(reverse)
    taps = [array(t) for t in (weights.conv_weight, weights.conv_bias)]
    parameters = [array(t) for t in (weights.timescale, weights.a[:, :states], weights.d, weights.timescale_bias)]
    number = max(torch.get_num_threads(), _CACHED // (4 * directions * length * channels))
    for first in range(0, images, number):
        few = slice(first, first + number)
        positions = [NO_POSITIONS if t is None else t[few].contiguous().numpy() for t in (index, source)]
        u = xz.new_empty(directions, min(number, images - first), length, channels)
        parts = torch.empty(-(-channels // BLOCK), *u.shape[:3], len(stats))
        run(
            conv, *rows(x[None, few]), *taps, *positions, flags, length,
            *whole(directions, u.shape[1], length), memory_of(u.view(-1, channels)),
        )  # fmt: skip
        for g in range(directions):
            projected[g, few] = linear(u[g], weights.projection[g].T)
        run(
            with_terms(scan),
            *(part for t in (u, low_rank[:, few], b[:, few], c[:, few], z[None, few]) for part in rows(t)),
            rank,
            *parameters,
            order,
            NO_GAP if gap is None else array(gap[few]),
            *(NO_FACTOR if factor is None else array(factor[few]) for factor in (delta_scale, repeats)),
            True,
            np.float32(scale),
            memory_of(y[few]),
            numbers(stats),
            parts.numpy(),
        )
        sums[:, few] = add_blocks(parts)
    return y, sums, projected
