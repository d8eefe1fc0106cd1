"""Depthwise convolution over a grid of tokens, with bias and SiLU, in one launch on channels-last data.

A program computes a tile of tokens and channels. For each tap it loads the tile shifted by rows and columns; the
overlap is read from the cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.formulas import LOG2E
from mtr_lab.ops.gpu.occupancy import on_its_device

TOKENS, CHANNELS, WARPS = 32, 64, 4  # of a program


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
    tokens = maps.permute(0, 2, 3, 1)
    if tokens.stride(3) != 1 or tokens.stride(1) != columns * tokens.stride(2):
        tokens = tokens.contiguous()
    y = maps.new_empty(images, rows, columns, channels)
    taps = weight.flatten(1).mT.contiguous()
    _convolve_grid[triton.cdiv(channels, CHANNELS), triton.cdiv(rows * columns, TOKENS), images](
        tokens, taps, bias, y, rows, columns, channels, tokens.stride(0), tokens.stride(2), SILU=silu,
        K=weight.shape[2], T=TOKENS, E=CHANNELS, num_warps=WARPS,
    )  # fmt: skip
    return y.permute(0, 3, 1, 2)


@triton.jit(do_not_specialize=["rows", "columns"])
def _convolve_grid(x, taps, bias, y, rows, columns, channels: tl.constexpr, step_image, step: tl.constexpr,
                   SILU: tl.constexpr, K: tl.constexpr, T: tl.constexpr, E: tl.constexpr):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * T + tl.arange(0, T)
    e = tl.program_id(0) * E + tl.arange(0, E)
    row, column, here = t // columns, t % columns, e < channels
    x += image * step_image + e[None, :]
    total = tl.zeros((T, E), tl.float32)
    if bias is not None:
        total += tl.load(bias + e, here, 0).to(tl.float32)[None, :]
    for i in tl.static_range(K):
        for j in tl.static_range(K):
            near_row, near_column = row + (i - K // 2), column + (j - K // 2)
            exists = (near_row >= 0) & (near_row < rows) & (near_column >= 0) & (near_column < columns)
            near = near_row * columns + near_column
            x_ij = tl.load(x + near[:, None] * step, exists[:, None] & here[None, :], 0).to(tl.float32)
            total += tl.load(taps + (i * K + j) * channels + e, here, 0).to(tl.float32)[None, :] * x_ij
    if SILU:
        total = total / (1 + tl.exp2(-total * LOG2E))
    at = y + (image * rows * columns + t)[:, None] * channels + e[None, :]
    tl.store(at, total.to(y.dtype.element_ty), (t < rows * columns)[:, None] & here[None, :])
