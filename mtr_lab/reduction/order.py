"""What the survivors are sorted by, ascending: (state, importance, target, source) -> (B, L).

Only the values at survivors count; ``source`` (B, r) are the positions that go, ``target`` (B, T) those of the targets.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mtr_lab.tokens import TokenState


def by_index(state: TokenState, importance: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """Their original order."""
    return state.index.double()


def by_importance(state: TokenState, importance: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """The special tokens first, then from the most to the least important."""
    return (-importance.double()).scatter(1, state.special, -torch.finfo(torch.float64).max)


def by_set(state: TokenState, importance: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """The targets behind all others, each in their original order."""
    behind = torch.zeros_like(importance, dtype=torch.float64).scatter_(1, target, 1)
    return behind * (state.index.amax() + 1) + state.index


def by_index_class_approximate(state: TokenState, importance: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """R-MeeTo's code: as in the sequence now, but the class token at ⌊its position · share that survives⌋."""
    length, removed = state.index.shape[1], source.shape[1]
    ordinary = torch.ones_like(importance, dtype=torch.float64).scatter_(1, source, 0).scatter_(1, state.special, 0)
    slots = state.special * (length - removed) // length
    return (ordinary.cumsum(1) - 1).scatter(1, state.special, slots.double() - 0.5)


ORDERS: dict[str, Callable[[TokenState, Tensor, Tensor, Tensor], Tensor]] = {
    "index": by_index,
    "importance": by_importance,
    "sets": by_set,
    "index_class_approximate": by_index_class_approximate,
}
