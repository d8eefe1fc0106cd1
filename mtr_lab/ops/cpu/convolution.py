"""The depthwise causal convolution with SiLU."""

from collections.abc import Sequence

import numba
import numpy as np
from torch import Tensor

from mtr_lab.ops.cpu.arrays import NO_POSITIONS, array, flags, rows, whole
from mtr_lab.ops.cpu.compiled import jit
from mtr_lab.ops.cpu.formulas import silu
from mtr_lab.ops.cpu.threads import run
from mtr_lab.ops.cpu.vectors import BLOCK, load, multiply_add, store

TOKENS = 8  # in one piece of work: few, so that threads share the tokens of one image evenly


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, reverse: Sequence[int]) -> Tensor:
    """The contract of ``causal_conv1d_reference``, for a float32 ``x`` on the CPU."""
    return _convolve(x, weight, bias, NO_POSITIONS, NO_POSITIONS, reverse)


def causal_conv1d_unmerged(
    x: Tensor, weight: Tensor, bias: Tensor, index: Tensor, source: Tensor, reverse: Sequence[int]
) -> Tensor:
    """The contract of ``causal_conv1d_unmerged_reference``, for a float32 ``x`` on the CPU."""
    return _convolve(x, weight, bias, index.contiguous().numpy(), source.contiguous().numpy(), reverse)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor, index: np.ndarray, source: np.ndarray, reverse: Sequence[int]
) -> Tensor:
    y = x.new_empty(weight.shape[0], *x.shape)
    windows = whole(weight.shape[0], *x.shape[:2])
    run(
        conv, *rows(x[None]), array(weight.mT), array(bias), index, source, flags(tuple(reverse)),
        x.shape[1], *windows, y.view(-1, x.shape[2]).numpy(),
    )  # fmt: skip
    return y


@jit(parallel=True)
def conv(x, x_step, weight, bias, index, source, reverse, length, begin, end, start, y):
    """``causal_conv1d`` for some of ``length`` tokens: from ``begin`` to before ``end`` of each direction and image.

    They are written to ``y`` (rows, E) from row ``start`` on; all three are (G, B). All channels of a token follow each
    other, so that memory is read in its order.

    ``x`` and ``x_step`` are the flat memory and the strides of (1, B, L, E); weight is (G, W, E), bias (G, E).
    ``index`` and ``source`` are empty for a convolution over the tokens.
    """
    directions, taps, channels = weight.shape
    images, unmerged = begin.shape[1], index.shape[0] > 0
    positions = source.shape[1] if unmerged else length
    parts = -(-length // TOKENS)
    kernel, shift, result = weight.reshape(-1), bias.reshape(-1), y.reshape(-1)
    for unit in numba.prange(images * parts):
        image, part = divmod(np.int64(unit), parts)
        for t in range(part * TOKENS, min(part * TOKENS + TOKENS, length)):
            position = index[image, t] if unmerged else t
            for g in range(directions):
                if not begin[g, image] <= t < end[g, image]:
                    continue
                row = start[g, image] + t - begin[g, image]
                for first in range(0, channels, BLOCK):
                    width = min(BLOCK, channels - first)
                    total = load(shift, g * channels + first, width)
                    for k in range(taps):
                        back = taps - 1 - k
                        near = position + back if reverse[g] else position - back
                        if 0 <= near < positions:
                            token = source[image, near] if unmerged else near
                            if token >= 0:
                                x_t = load(x, image * x_step[1] + token * x_step[2] + first, width)
                                total = multiply_add(load(kernel, (g * taps + k) * channels + first, width), x_t, total)
                    store(result, row * channels + first, silu(total), width)
