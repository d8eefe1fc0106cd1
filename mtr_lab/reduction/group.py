"""Which tokens may go and which may take them in.

B images, L tokens, S of them protected. A grouping yields candidate sources (B, A) and targets (B, T), positions in the
sequence; how many there are depends on L, S and r alone, so shapes are static. Protected tokens are in neither.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """Positions of the candidate sources (B, A) and of the targets (B, T)."""

    source: Tensor
    target: Tensor


@dataclass(frozen=True)
class Grouping:
    """A grouping and its sizes: ``split(pool, score, remove, target_fraction)`` and ``sizes(pool, remove, …)``.

    ``pool`` is (B, P), the ordinary tokens still there, in sequence order; ``sizes`` takes P and returns (A, T).
    """

    split: Callable[[Tensor, Tensor, int, float], Groups]
    sizes: Callable[[int, int, float], tuple[int, int]]


def ascending(pool: Tensor, score: Tensor) -> Tensor:
    """The pool from the least to the most important token; of equals, the earlier first."""
    return pool.gather(1, score.gather(1, pool).argsort(dim=1, stable=True))


def _asymmetric_sizes(pool: int, remove: int, target_fraction: float) -> tuple[int, int]:
    return remove, max(1, round(target_fraction * (pool - remove)))


def _asymmetric(pool: Tensor, score: Tensor, remove: int, target_fraction: float) -> Groups:
    sources, targets = _asymmetric_sizes(pool.shape[1], remove, target_fraction)
    ranked = ascending(pool, score)
    return Groups(ranked[:, :sources], ranked[:, sources : sources + targets])


def _half_sizes(pool: int, remove: int, target_fraction: float) -> tuple[int, int]:
    return pool // 2, pool - pool // 2


def _halves(pool: Tensor, score: Tensor, remove: int, target_fraction: float) -> Groups:
    ranked = ascending(pool, score)
    return Groups(ranked[:, : pool.shape[1] // 2], ranked[:, pool.shape[1] // 2 :])


def _alternate_sizes(pool: int, remove: int, target_fraction: float) -> tuple[int, int]:
    return pool - pool // 2, pool // 2


def _alternate(pool: Tensor, score: Tensor, remove: int, target_fraction: float) -> Groups:
    return Groups(pool[:, ::2], pool[:, 1::2])


GROUPINGS = {
    "asymmetric": Grouping(_asymmetric, _asymmetric_sizes),
    "halves": Grouping(_halves, _half_sizes),
    "alternate": Grouping(_alternate, _alternate_sizes),
}
"""``asymmetric``: the r least important are sources, the next least important targets (MTR). ``halves``: the lower and
the upper half by importance (UTR). ``alternate``: every other token, by position (ToMe)."""


def ordinary_tokens(special: Tensor, length: int) -> Tensor:
    """Positions of the tokens that are not protected, in order: special (B, S) -> (B, L - S)."""
    protected = torch.zeros(special.shape[0], length, dtype=torch.uint8, device=special.device)
    return protected.scatter_(1, special, 1).argsort(dim=1, stable=True)[:, : length - special.shape[1]]
