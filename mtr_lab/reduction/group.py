"""Which tokens may go and which may take them in.

B images, L tokens, S of them special. A grouping yields candidate sources (B, A) and targets (B, T), positions in the
sequence; how many there are depends on L, S and r alone, so shapes are static. Special tokens are in neither.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Groups(NamedTuple):
    """Positions of the candidate sources (B, A) and of the targets (B, T)."""

    source: Tensor
    target: Tensor


@dataclass(frozen=True)
class Grouping:
    """A grouping and its sizes: ``split(tokens, remove, target_fraction)`` and ``sizes(P, remove, target_fraction)``.

    ``tokens`` is (B, P), the ordinary tokens still there: from the least to the most important where the grouping is
    ``ranked``, else in sequence order. ``sizes`` returns (A, T).
    """

    split: Callable[[Tensor, int, float], Groups]
    sizes: Callable[[int, int, float], tuple[int, int]]
    ranked: bool


def ascending(pool: Tensor, score: Tensor) -> Tensor:
    """Positions (B, P) from the least to the most important token by score (B, L); of equals, the earlier first."""
    return pool.gather(1, score.gather(1, pool).argsort(dim=1, stable=True))


def _asymmetric_sizes(pool: int, remove: int, target_fraction: float) -> tuple[int, int]:
    return remove, max(1, round(target_fraction * (pool - remove)))


def _asymmetric(ranked: Tensor, remove: int, target_fraction: float) -> Groups:
    sources, targets = _asymmetric_sizes(int(ranked.shape[1]), remove, target_fraction)
    return Groups(ranked[:, :sources], ranked[:, sources : sources + targets])


def _half_sizes(pool: int, remove: int, target_fraction: float) -> tuple[int, int]:
    return pool // 2, pool - pool // 2


def _halves(ranked: Tensor, remove: int, target_fraction: float) -> Groups:
    return Groups(ranked[:, : ranked.shape[1] // 2], ranked[:, ranked.shape[1] // 2 :])


def _alternate_sizes(pool: int, remove: int, target_fraction: float) -> tuple[int, int]:
    return pool - pool // 2, pool // 2


def _alternate(pool: Tensor, remove: int, target_fraction: float) -> Groups:
    return Groups(pool[:, ::2], pool[:, 1::2])


GROUPINGS = {
    "asymmetric": Grouping(_asymmetric, _asymmetric_sizes, ranked=True),
    "halves": Grouping(_halves, _half_sizes, ranked=True),
    "alternate": Grouping(_alternate, _alternate_sizes, ranked=False),
}
"""``asymmetric``: the r least important are sources, the next least important targets (MTR). ``halves``: the lower and
the upper half by importance (UTR). ``alternate``: every other token, by position (ToMe)."""
