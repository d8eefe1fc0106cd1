"""The statistics of the scan: sums over channels, computed for each direction and token.

A statistic is an entry of ``STATISTICS``, and a new entry is all that a new statistic needs. Its term is plain
arithmetic: PyTorch runs it, and numba and Triton compile it into their kernels.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtr_lab.errors import unknown


class Statistic(NamedTuple):
    """A sum over channels that the scan emits for each direction and token."""

    term: Callable[..., Any]
    """The term of one channel, a function of Δ, u, the output y before the gate, and ``maximum``, which returns the
    larger of two numbers. It uses these and arithmetic alone. It is 0 for Δ = u = y = 0, since kernels pad channels."""
    reads_output: bool = False
    """Whether the term reads y. Other statistics are computed before the scan, by the kernels that compute Δ."""


def _delta(delta, u, y, maximum):  # type: ignore[no-untyped-def]
    return delta


def _write(delta, u, y, maximum):  # type: ignore[no-untyped-def]
    written = delta * u
    return written * written


def _output(delta, u, y, maximum):  # type: ignore[no-untyped-def]
    return maximum(y, 0)


STATISTICS = {"delta": Statistic(_delta), "write": Statistic(_write), "output": Statistic(_output, reads_output=True)}
STATS = tuple(STATISTICS)
"""The names of all statistics."""


def check_statistics(stats: Sequence[str]) -> None:
    """Raise a ``UserError`` unless every name is one of ``STATS``."""
    for name in stats:
        if name not in STATISTICS:
            raise unknown("scan statistic", name, tuple(STATISTICS))


def emitted(stats: Sequence[str]) -> list[str]:
    """The order in which implementations emit these statistics: without repetition, those that read the output last."""
    return sorted((name for name in STATISTICS if name in stats), key=lambda name: STATISTICS[name].reads_output)


def as_asked(sums: Tensor, stats: Sequence[str]) -> Tensor:
    """The sums in the order of ``emitted(stats)``, (..., n) -> in the order of ``stats``, (..., len(stats))."""
    order = emitted(stats)
    if order == list(stats):
        return sums
    return torch.stack([sums[..., order.index(name)] for name in stats], dim=-1)


def channel_sums(stats: Sequence[str], delta: Tensor, u: Tensor, y: Tensor) -> Tensor:
    """Statistics of Δ, u and the output before the gate, each (G, B, L, E) -> (G, B, L, len(stats))."""
    sums = [STATISTICS[name].term(delta, u, y, _maximum).sum(-1) for name in stats]
    return torch.stack(sums, dim=-1) if sums else y.new_empty(*y.shape[:3], 0)


def _maximum(x: Tensor, floor: Any) -> Tensor:
    return x.clamp(min=floor)
