"""Merge rules: which survivor absorbs a removed token, and the weights of the average. B images, L tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mtr_lab.tokens import TokenState


def equal(state: TokenState, importance: Tensor) -> Tensor:
    """The plain mean: weights (B, L) of 1."""
    return torch.ones_like(state.size)


def by_size(state: TokenState, importance: Tensor) -> Tensor:
    """Weights (B, L): size, the number of original tokens that a token stands for."""
    return state.size


def by_importance(state: TokenState, importance: Tensor) -> Tensor:
    """Weights (B, L): exp(score), so that the average uses the softmax of the scores."""
    return importance.exp()


@dataclass(frozen=True)
class Merge:
    """A merge rule.

    Args:
        mass: (state, importance (B, L)) -> (B, L), the weights of tokens in the average, not normalised.
        into: what absorbs a removed token: the ``nearest`` target by the policy's matching, ``one`` target for all (the
            least important), or ``nothing``, which drops the token.
        groupings: the values of ``mtr.grouping`` that the rule works with, all of them if empty.
        normalised: whether merged tokens are averaged, else added.
    """

    mass: Callable[[TokenState, Tensor], Tensor] = equal
    into: Literal["nearest", "one", "nothing"] = "nearest"
    groupings: tuple[str, ...] = ()
    normalised: bool = True

    def compares(self, sources: int, remove: int) -> bool:
        """Whether tokens are compared: to find the nearest target, or to choose ``remove`` of the candidate sources."""
        return self.into == "nearest" or sources > remove


MERGES = {
    "mean": Merge(),
    "size": Merge(by_size),
    "sum": Merge(normalised=False),
    "fuse": Merge(by_importance, into="one", groupings=("asymmetric",)),
    "prune": Merge(into="nothing"),
}
"""``mean``: the plain mean with the most similar target (MTR). ``size``: the same, weighted by size (ToMe). ``sum``:
the same, added (STORM). ``fuse``: all removed tokens become one (EViT). ``prune``: removed tokens are dropped."""
