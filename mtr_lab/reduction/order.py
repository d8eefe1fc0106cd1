"""Sort keys of the survivors, ascending. B images, L tokens.

Every function takes state, importance (B, L), target (B, T) int64 and source (B, r) int64, and returns (B, L) float64.
``source`` are the positions of the removed tokens, ``target`` those of the targets. Keys of removed tokens are ignored.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mtr_lab.tokens import TokenState


def by_index(state: TokenState, importance: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """Keys (B, L): the survivors in their original order."""
    return state.index.double()


def by_importance(state: TokenState, importance: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """Keys (B, L): the special tokens first, then from the most to the least important."""
    return (-importance.double()).scatter(1, state.special, -torch.finfo(torch.float64).max)


def by_set(state: TokenState, importance: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """Keys (B, L): the other tokens in their original order, then the targets in theirs."""
    behind = torch.zeros_like(importance, dtype=torch.float64).scatter_(1, target, 1)
    return behind * (state.index.amax() + 1) + state.index


def by_index_class_approximate(state: TokenState, importance: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """Keys (B, L): the current order, but the class token at ⌊position · share of survivors⌋, as in R-MeeTo's code."""
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
