"""The statistics of a scan: their terms compiled into its kernel, and summed over a block of channels."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import numpy as np

from mtr_lab.ops.cpu.compiled import jit
from mtr_lab.ops.cpu.formulas import maximum
from mtr_lab.ops.cpu.vectors import BLOCK
from mtr_lab.ops.statistics import STATISTICS

GROUP = 16  # tokens whose statistics are summed in parallel: each addition to one sum waits for the one before


def with_terms(body: Any) -> Any:
    """A kernel with the terms of all statistics compiled into it, as ``_add_up``.

    A kernel for each selection of statistics would take seconds to compile for each of them.
    """
    return _compiled(body, tuple(statistic.term for statistic in STATISTICS.values()))


@functools.cache
def _compiled(body: Any, terms: tuple[Callable[..., Any], ...]) -> Any:
    code = [(term.__code__.co_code, term.__code__.co_consts, term.__code__.co_names) for term in terms]
    kernel = FunctionType(body.__code__, body.__globals__ | {"_add_up": _add_up_one_of(terms)})
    kernel.__qualname__ = f"{body.__name__}_{hashlib.sha256(repr(code).encode()).hexdigest()[:16]}"
    return jit(parallel=True)(kernel)


def _add_up_one_of(terms: tuple[Callable[..., Any], ...], first: int = 0) -> Any:
    """A function that sums ``terms[which]`` over a block of channels, from Δ, u and y of a group of tokens."""
    if not terms:
        return jit()(lambda which, dts, inputs, outputs, total: None)
    term, otherwise = jit()(terms[0]), _add_up_one_of(terms[1:], first + 1)

    @jit()
    def add_up(which, dts, inputs, outputs, total):
        if which == first:
            total[:] = 0
            for j in range(BLOCK):
                for k in range(GROUP):
                    at = k * BLOCK + j
                    total[k] += term(dts[at], inputs[at], outputs[at], maximum)
        else:
            otherwise(which, dts, inputs, outputs, total)

    return add_up


def numbers(stats: Sequence[str]) -> np.ndarray:
    """The places of the terms of these statistics among all terms."""
    names = list(STATISTICS)
    return np.array([names.index(name) for name in stats], dtype=np.int64)
