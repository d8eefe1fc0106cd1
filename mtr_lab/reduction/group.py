"""Candidate sources (tokens that may be removed) and targets (tokens that may absorb them).

B images, L tokens, S of them special, r tokens to remove. A grouping returns the positions of the candidate sources
(B, A) and of the targets (B, T). A and T depend on L, S and r alone, so shapes are static. Special tokens are neither
sources nor targets.
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
    """A grouping of P ordinary tokens.

    Args:
        split: (tokens (B, P), remove, target_fraction) -> groups.
        sizes: (P, remove, target_fraction) -> (A, T).
        ranked: whether ``split`` takes the tokens from the least to the most important one, else in sequence order.
    """

    split: Callable[[Tensor, int, float], Groups]
    sizes: Callable[[int, int, float], tuple[int, int]]
    ranked: bool


def ascending(tokens: Tensor, score: Tensor) -> Tensor:
    """Positions ``tokens`` (B, P), sorted from the lowest to the highest score (B, L); of equals, the earlier first."""
    return tokens.gather(1, score.gather(1, tokens).argsort(dim=1, stable=True))


def _asymmetric_sizes(tokens: int, remove: int, target_fraction: float) -> tuple[int, int]:
    return remove, max(1, round(target_fraction * (tokens - remove)))


def _asymmetric(ranked: Tensor, remove: int, target_fraction: float) -> Groups:
    sources, targets = _asymmetric_sizes(int(ranked.shape[1]), remove, target_fraction)
    return Groups(ranked[:, :sources], ranked[:, sources : sources + targets])


def _half_sizes(tokens: int, remove: int, target_fraction: float) -> tuple[int, int]:
    return tokens // 2, tokens - tokens // 2


def _halves(ranked: Tensor, remove: int, target_fraction: float) -> Groups:
    return Groups(ranked[:, : ranked.shape[1] // 2], ranked[:, ranked.shape[1] // 2 :])


def _alternate_sizes(tokens: int, remove: int, target_fraction: float) -> tuple[int, int]:
    return tokens - tokens // 2, tokens // 2


def _alternate(tokens: Tensor, remove: int, target_fraction: float) -> Groups:
    return Groups(tokens[:, ::2], tokens[:, 1::2])


GROUPINGS = {
    "asymmetric": Grouping(_asymmetric, _asymmetric_sizes, ranked=True),
    "halves": Grouping(_halves, _half_sizes, ranked=True),
    "alternate": Grouping(_alternate, _alternate_sizes, ranked=False),
}
"""``asymmetric``: the r least important tokens are sources, the next least important are targets (MTR). ``halves``: the
less important half are sources, the other half targets (UTR). ``alternate``: sources and targets take turns in the
sequence (ToMe)."""
