"""The most similar target of each candidate source, and their similarity."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mtr_lab import ops
from mtr_lab.reduction.group import GROUPINGS
from mtr_lab.reduction.lines import LINES
from mtr_lab.tokens import TokenState


@dataclass(frozen=True)
class Matching:
    """How sources find their targets.

    Args:
        match: state, features (B, L, C), positions of sources (B, A) and of targets (B, T) -> target of each source and
            similarity, (B, A) each.
        comparisons: (A, T, axes of the grid) -> the number of pairs that are compared in a sequence.
        groupings: the values of ``mtr.grouping`` that it works with.
        cosine: whether the cosine is compared, else the negative L1 distance.
    """

    match: Callable[[TokenState, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    comparisons: Callable[[int, int, int], int]
    groupings: tuple[str, ...]
    cosine: bool = True


def cosine(state: TokenState, features: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The target of the highest cosine similarity."""
    return ops.nearest(features, source, target)


def grid_axes(state: TokenState) -> tuple[int, ...]:
    """The axes of the grid of original positions; of a state without a layout, the sequence."""
    return (state.index.shape[1],) if state.layout is None else state.layout.axes


def neighbours(state: TokenState, features: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The target of the highest cosine similarity among those that stood within one row and column, see ``ops``."""
    return ops.nearest_neighbour(features, state.index, state.special, source, target, grid_axes(state))


def adjacent(
    state: TokenState, features: Tensor, source: Tensor, target: Tensor, *, cosine: bool
) -> tuple[Tensor, Tensor]:
    """The more similar of the two neighbours in the sequence; sources and targets take turns in it.

    A token without a neighbour among the targets has the similarity -∞, and goes only after all others.
    """
    last = target.shape[1] - 1
    turn = torch.arange(source.shape[1], device=source.device)
    before, after = target[:, (turn - 1).clamp(min=0)], target[:, turn.clamp(max=last)]
    pairs = source.repeat(1, 2), torch.cat([before, after], dim=1)
    similarity = ops.pair_similarity(features, *pairs, cosine=cosine)
    similarity = similarity.masked_fill((pairs[0] - pairs[1]).abs() != 1, -torch.inf)
    left, right = similarity.chunk(2, dim=1)
    return torch.where(left > right, before, after), torch.maximum(left, right)


MATCHINGS = {
    "cosine": Matching(cosine, lambda sources, targets, axes: sources * targets, tuple(GROUPINGS)),
    "neighbours": Matching(
        neighbours, lambda sources, targets, axes: sources * min(targets, 3 ** min(axes, 2) - 1), tuple(GROUPINGS)
    ),
    "adjacent": Matching(
        partial(adjacent, cosine=True), lambda sources, targets, axes: 2 * sources, ("alternate", LINES)
    ),
    "l1": Matching(
        partial(adjacent, cosine=False), lambda sources, targets, axes: 2 * sources, ("alternate", LINES), False
    ),
}
"""``cosine``: the target of the highest cosine similarity. ``neighbours``: the same of targets that stood at most one
row and column away (in a video in the same frame) before any reduction. ``adjacent``: neighbours in the sequence alone.
``l1``: these, by the negative L1 distance instead of the cosine."""

FEATURES: dict[str, Callable[[TokenState], Tensor]] = {
    "stream": lambda state: state.stream,
    "hidden": lambda state: state.hidden,
    "residual": lambda state: state.hidden if state.residual is None else state.residual,
}
"""The vectors that are compared, (B, L, C): the residual stream after the block, the output of the block alone, or the
residual stream before the block."""
