"""The statistics of the scan: sums over the channels, which say what each direction did with each token.

A statistic is a row of ``STATISTICS``. Its formula is plain arithmetic: PyTorch runs it as it is, and numba and Triton
compile it into their kernels. A new row is all that a new statistic takes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Statistic(NamedTuple):
    """A number that the scan emits for each direction and token."""

    term: Callable[..., Any]
    """What a channel adds to it: a function of Δ, u, the output y before the gate, and ``maximum``, which gives the
    greater of two numbers. It uses these and arithmetic alone, and is 0 where Δ, u and y are: kernels pad channels."""
    reads_output: bool = False
    """Whether it reads y; if not, it is known before the scan, where kernels compute Δ."""


def _delta(delta, u, y, maximum):  # type: ignore[no-untyped-def]
    return delta


def _write(delta, u, y, maximum):  # type: ignore[no-untyped-def]
    written = delta * u
    return written * written


def _output(delta, u, y, maximum):  # type: ignore[no-untyped-def]
    return maximum(y, 0)


STATISTICS = {"delta": Statistic(_delta), "write": Statistic(_write), "output": Statistic(_output, reads_output=True)}
STATS = tuple(STATISTICS)
"""Their names."""


def emitted(stats: Sequence[str]) -> list[str]:
    """The statistics asked for in the order in which implementations emit them: once each, those of the output last."""
    return sorted((name for name in STATISTICS if name in stats), key=lambda name: STATISTICS[name].reads_output)


def as_asked(sums: Tensor, stats: Sequence[str]) -> Tensor:
    """What was ``emitted`` for ``stats``, (..., n), in their order."""
    order = emitted(stats)
    if order == list(stats):
        return sums
    return torch.stack([sums[..., order.index(name)] for name in stats], dim=-1)


def channel_sums(stats: Sequence[str], delta: Tensor, u: Tensor, y: Tensor) -> Tensor:
    """The statistics from Δ, u and the output before the gate, all (G, B, L, E) -> (G, B, L, len(stats))."""
    sums = [STATISTICS[name].term(delta, u, y, _maximum).sum(-1) for name in stats]
    return torch.stack(sums, dim=-1) if sums else y.new_empty(*y.shape[:3], 0)


def _maximum(x: Tensor, floor: Any) -> Tensor:
    return x.clamp(min=floor)
