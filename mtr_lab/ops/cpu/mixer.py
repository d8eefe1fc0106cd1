"""The Mamba mixer without in_proj and out_proj."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mtr_lab.ops.cpu.arrays import NO_FACTOR, NO_GAP, NO_POSITIONS, array, flags, memory_of, raster, whole
from mtr_lab.ops.cpu.convolution import conv
from mtr_lab.ops.cpu.scan import scan
from mtr_lab.ops.cpu.scan_statistics import numbers, with_terms
from mtr_lab.ops.cpu.threads import run, share_of
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
    directions, dtype = len(reverse), xz.dtype
    number = min(max(images, 1), max(torch.get_num_threads(), _CACHED // (4 * directions * length * channels)))
    y, u = xz.new_empty(images, length, channels), xz.new_empty(number * directions * length * channels)
    # The directions are added up in float32.
    total = y if dtype == torch.float32 else torch.empty(number, length, channels)
    projected = torch.empty(directions, images, length, weights.projection.shape[2])
    sums = torch.empty(directions, images, length, len(stats))
    parts = torch.empty(-(-channels // BLOCK), directions * number * length * len(stats)).numpy()

    tokens, convolved, written, added = (memory_of(t) for t in (xz.contiguous(), u, y, total))
    tokens, low_rank = tokens.reshape(-1), projected.numpy().reshape(-1)
    columns = projected.shape[3]  # low-rank Δ, B and C side by side
    at_b, at_c = columns - 2 * weights.a.shape[1], columns - weights.a.shape[1]
    steps = (0, length * 2 * channels, 2 * channels), (images * length * columns, length * columns, columns)
    taps = array(weights.conv_weight), array(weights.conv_bias)
    parameters = [array(t) for t in (weights.timescale, weights.a[:, :states], weights.d, weights.timescale_bias)]
    products, backward = weights.projection.mT.unbind(), flags(tuple(reverse))
    for first in range(0, images, number):
        count = min(number, images - first)
        few = slice(first, first + count)
        size = directions * count * length
        own, rest = tokens[first * steps[0][1] :], low_rank[first * steps[1][1] :]
        positions = (NO_POSITIONS if t is None else t[few].contiguous().numpy() for t in (index, source))
        run(
            conv, own, steps[0], *taps, *positions, backward, length, *whole(directions, count, length),
            convolved[: size * channels].reshape(size, channels), share=share_of(size * channels),
        )  # fmt: skip
        for g, x in enumerate(u[: size * channels].view(directions, count, length, channels).unbind()):
            projected[g, few] = linear(x, products[g])
        blocks = parts[:, : size * len(stats)].reshape(len(parts), directions, count, length, len(stats))
        run(
            with_terms(scan),
            *(convolved, (count * length * channels, length * channels, channels)),
            *(part for at in (0, at_b, at_c) for part in (rest[at:], steps[1])),
            *(own[channels:], steps[0]),
            rank,
            *parameters,
            raster(length, tuple(reverse)),
            NO_GAP if gap is None else array(gap[few]),
            *(NO_FACTOR if factor is None else array(factor[few]) for factor in (delta_scale, repeats)),
            True,
            np.float32(scale),
            added[few] if total is y else added[:count],
            written[few],
            numbers(stats),
            blocks,
        )
        if stats:
            sums[:, few] = torch.from_numpy(np.add.reduce(blocks))
    return y, sums, projected
