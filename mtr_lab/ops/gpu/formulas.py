"""Formulas that several kernels compute: softplus, SiLU, and the terms of the scan's statistics."""

from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any

import torch
import triton
import triton.language as tl

from mtr_lab.ops.gpu.occupancy import INTERPRETED
from mtr_lab.ops.statistics import STATISTICS

LOG2E = tl.constexpr(1.4426950408889634)
APPROXIMATE = torch.version.hip is None and not INTERPRETED  # the instructions of NVIDIA's special-function unit


@triton.jit
def softplus(x):
    """log(1 + exp(x)); log(1 + w) is w times a polynomial in w, Chebyshev fit on [0, 1], relative error below 3e-7."""
    w = tl.exp2(-tl.abs(x) * LOG2E)
    p = -0.008336497470736504 * w + 0.04337085038423538
    p = p * w - 0.10667790472507477
    p = p * w + 0.1767549365758896
    p = p * w - 0.2447046935558319
    p = p * w + 0.3327118754386902
    p = p * w - 0.49997127056121826
    p = p * w + 0.9999997615814209
    return tl.maximum(x, 0) + w * p


@triton.jit
def silu(x):
    """x / (1 + exp(-x))."""
    return x / (1 + tl.exp2(-x * LOG2E))


@triton.jit
def silu_once(x, APPROXIMATE: tl.constexpr):
    """``silu``, on NVIDIA's GPUs to 2e-7 and impure.

    So the compiler does not compute its argument twice where it is stored and multiplied.
    """
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 t, t;
            mul.f32 $0, $1, t;
            }""",
            "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return silu(x)


@triton.jit
def growth(x, times):
    """Σ 2^(k x) over k < ``times``, for x ≤ 0: by it a run of equal tokens multiplies the input of one."""
    x = tl.minimum(x, -1e-30)  # the limit at 0 is ``times``
    return _exp2_minus_1(times * x) / _exp2_minus_1(x)


@triton.jit
def _exp2_minus_1(x):
    """2^x - 1 for x ≤ 0, without cancellation near 0: there x times a polynomial, minimax fit on [-½, ½], 9e-8."""
    p = 0.0013264726 * x + 0.0096715127
    p = p * x + 0.0555073375
    p = p * x + 0.2402224208
    p = p * x + 0.6931469776
    return tl.where(x > -0.5, p * x, tl.exp2(x) - 1)


@cache
def _compiled(term: Callable[..., Any]) -> Any:
    if INTERPRETED:  # the interpreter patches ``tl`` among the globals of a function
        term = FunctionType(term.__code__, term.__globals__ | {"tl": tl})
    return triton.jit(term)


def terms(stats: Sequence[str]) -> tuple[Any, ...]:
    """The terms of these statistics as functions that a kernel takes as an argument and calls."""
    return tuple(_compiled(STATISTICS[name].term) for name in stats)


@triton.jit
def maximum(x, y):
    """The argument ``maximum`` of a statistic's term."""
    return tl.maximum(x, y)
