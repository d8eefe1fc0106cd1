"""Functions of scalars and vectors within kernels: exponentials by polynomials, sums over channels."""

import numpy as np

from mtr_lab.ops.cpu.compiled import jit
from mtr_lab.ops.cpu.vectors import (
    BLOCK,
    CACHE_LINE,
    choose_below,
    load,
    prefetch,
    sum_of_lanes,
    times_power_of_2,
)

AHEAD = 4  # tokens between prefetching a row and using it
f32 = np.float32
LOG2E = f32(1.4426950408889634)
LN2 = f32(0.6931471805599453)
LN2_HIGH, LN2_LOW = f32(0.693359375), f32(-2.12194440e-4)
# Adding it rounds a small float to an integer, in the lowest bits of the sum; subtracting it gives the rounded float.
ROUND = f32(1.5 * 2**23)
# 2^f = 1 + f·P(f) on [-½, ½], relative error 9e-8; 2·atanh(s) = s·Q(s²) on [0, ⅓], 4e-9. Minimax fits.
P0, P1, P2, P3, P4 = map(f32, (0.6931469776, 0.2402224208, 0.0555073375, 0.0096715127, 0.0013264726))
Q0, Q1, Q2, Q3, Q4 = map(f32, (2.0, 0.66666315, 0.4002491, 0.27960605, 0.28178326))


@jit(forceinline=True)
def token_row(x, step, g, image, t, later, first, width):
    """The channels from ``first`` to ``first + width`` of token t; those of token ``later`` are prefetched."""
    start = g * step[0] + image * step[1] + first
    prefetch(x, start + later * step[2])
    at = start + t * step[2]
    return x[at : at + width]


@jit(forceinline=True)
def _scaled_exp2(fraction, rounded):
    """2^(fraction + n) for ``rounded`` = ROUND + n."""
    p = f32(1) + fraction * (P0 + fraction * (P1 + fraction * (P2 + fraction * (P3 + fraction * P4))))
    return times_power_of_2(p, rounded)


@jit(forceinline=True)
def exp2(x):
    """2^x for x ≤ 0; the result does not go below 2^-126."""
    x = maximum(x, f32(-126))
    rounded = x + ROUND
    return _scaled_exp2(x - (rounded - ROUND), rounded)


@jit(forceinline=True)
def _exp2_minus_1(x):
    """2^x - 1 for x ≤ 0, without cancellation near 0."""
    near, far = x * (P0 + x * (P1 + x * (P2 + x * (P3 + x * P4)))), exp2(x) - f32(1)
    return choose_below(f32(-0.5), x, near, far)


@jit(forceinline=True)
def geometric_sum(x, times):
    """Σ 2^(k x) over k < ``times``, for x ≤ 0."""
    x = choose_below(f32(-1e-30), x, f32(-1e-30), x)  # the limit at 0 is ``times``
    return _exp2_minus_1(times * x) / _exp2_minus_1(x)


@jit(forceinline=True)
def _exp(x):
    """e^x for x ≤ 0, with the argument reduced in two steps so that the relative error does not grow with x."""
    x = maximum(x, f32(-87))
    rounded = x * LOG2E + ROUND
    n = rounded - ROUND
    return _scaled_exp2(LOG2E * ((x - n * LN2_HIGH) - n * LN2_LOW), rounded)


@jit(forceinline=True)
def softplus(x):
    """max(0, x) + log(1 + e^-|x|), the logarithm as 2·atanh(e / (2 + e))."""
    e = _exp(choose_below(x, f32(0), x, f32(0) - x))
    s = e / (f32(2) + e)
    q = s * s
    return maximum(x, f32(0)) + s * (Q0 + q * (Q1 + q * (Q2 + q * (Q3 + q * Q4))))


@jit(forceinline=True)
def silu(x):
    e = _exp(choose_below(x, f32(0), x, f32(0) - x))
    return choose_below(x, f32(0), x * e, x) / (f32(1) + e)


@jit(forceinline=True)
def sigmoid(x):
    e = _exp(-abs(x))
    return (e if x < f32(0) else f32(1)) / (f32(1) + e)


@jit(forceinline=True)
def maximum(x, floor):
    return choose_below(x, f32(floor), f32(floor), x)


@jit()
def scratch(size):
    """Zeros that begin at a cache line: a vector that crosses one takes two accesses."""
    memory = np.zeros(size + CACHE_LINE, f32)
    first = -(memory.ctypes.data // 4) % CACHE_LINE
    return memory[first : first + size]


@jit(forceinline=True)
def dot(x, i, j, count):
    """The product of two vectors of ``count`` channels that begin at ``i`` and ``j``."""
    total = load(x, i, min(BLOCK, count)) * load(x, j, min(BLOCK, count))
    for c in range(BLOCK, count, BLOCK):
        width = min(BLOCK, count - c)
        total = total + load(x, i + c, width) * load(x, j + c, width)
    return sum_of_lanes(total)
