"""Depthwise convolution over a grid of tokens, with bias and SiLU, in one launch on channels-last data.

A program is one warp, with some columns of an image and a channel a thread. It walks down the rows and holds the sums
of the K rows of output that a row of input contributes to, so that a value is loaded once for all of them.
"""

import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.formulas import silu
from mtr_lab.ops.gpu.occupancy import check_launch, on_its_device

COLUMNS, CHANNELS = 8, 32  # of a program


@on_its_device
def convolve(maps: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool) -> Tensor:
    """``depthwise_conv2d_reference`` for float32, float16 or bfloat16 data, accumulated in float32.

    Args:
        maps: (B, E, rows, columns), copied unless channels are contiguous and tokens evenly spaced.
        weight: (E, 1, K, K), K odd, any floating dtype.
        bias: (E,), any floating dtype.
        silu: whether SiLU follows.

    Returns:
        (B, E, rows, columns), channels-last, in the dtype of ``maps``.
    """
    images, channels, rows, columns = maps.shape
    check_launch(images)
    tokens = maps.permute(0, 2, 3, 1)
    if tokens.stride(3) != 1 or tokens.stride(1) != columns * tokens.stride(2):
        tokens = tokens.contiguous()
    y = maps.new_empty(images, rows, columns, channels)
    _convolve_grid[triton.cdiv(channels, CHANNELS), triton.cdiv(columns, COLUMNS), images](
        tokens, weight.contiguous(), bias, y, rows, columns, channels, tokens.stride(0), tokens.stride(2), SILU=silu,
        K=weight.shape[2], T=COLUMNS, E=CHANNELS, num_warps=1,
    )  # fmt: skip
    return y.permute(0, 3, 1, 2)


@triton.jit
def _row(x, row, rows, first, columns, e, here, step: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH values of a row of the input, from column ``first`` on; zeros outside the grid."""
    values = ()
    for c in tl.static_range(WIDTH):
        column = first + c
        exists = here & (column >= 0) & (column < columns) & (row < rows)
        values = values + (tl.load(x + (row * columns + column) * step + e, exists, 0),)
    return values


@triton.jit
def _store(y, sums, row, first, columns, e, here, channels: tl.constexpr, SILU: tl.constexpr, T: tl.constexpr):
    """T values of a row of the output, if there is such a row."""
    for t in tl.static_range(T):
        value = sums[t]
        if SILU:
            value = silu(value)
        at = y + (row * columns + first + t) * channels + e
        tl.store(at, value.to(y.dtype.element_ty), here & (first + t < columns) & (row >= 0))


@triton.jit(do_not_specialize=["rows", "columns"])
def _convolve_grid(x, weight, bias, y, rows, columns, channels: tl.constexpr, step_image, step: tl.constexpr,
                   SILU: tl.constexpr, K: tl.constexpr, T: tl.constexpr, E: tl.constexpr):  # fmt: skip
    e = tl.program_id(0) * E + tl.arange(0, E)
    first, image, here = tl.program_id(1) * T, tl.program_id(2).to(tl.int64), e < channels
    x += image * step_image
    y += image * rows * columns * channels
    taps = ()
    for i in tl.static_range(K * K):
        taps = taps + (tl.load(weight + e * (K * K) + i, here, 0).to(tl.float32),)
    start = tl.zeros((E,), tl.float32)
    if bias is not None:
        start += tl.load(bias + e, here, 0).to(tl.float32)
    sums = ()  # of K rows of output, the first of which the present row of input completes
    for _ in tl.static_range(K * T):
        sums = sums + (start,)
    values = _row(x, 0, rows, first - K // 2, columns, e, here, step, T + K - 1)
    for row in range(rows):
        following = _row(x, row + 1, rows, first - K // 2, columns, e, here, step, T + K - 1)
        now = ()
        for c in tl.static_range(T + K - 1):
            now = now + (values[c].to(tl.float32),)
        added = ()
        for i in tl.static_range(K):
            for t in tl.static_range(T):
                total = sums[i * T + t]
                for j in tl.static_range(K):
                    total += taps[(K - 1 - i) * K + j] * now[t + j]
                added = added + (total,)
        _store(y, added, row - K // 2, first, columns, e, here, channels, SILU, T)
        values, sums = following, ()
        for i in tl.static_range(T, K * T):
            sums = sums + (added[i],)
        for _ in tl.static_range(T):
            sums = sums + (start,)
    for i in tl.static_range(K // 2):
        rest = ()
        for t in tl.static_range(T):
            rest = rest + (sums[i * T + t],)
        _store(y, rest, rows - K // 2 + i, first, columns, e, here, channels, SILU, T)
