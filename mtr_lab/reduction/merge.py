"""What becomes of the tokens that go: into which they are merged, and how those that become one are averaged.

B images, L tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mtr_lab.tokens import TokenState


def equal(state: TokenState, importance: Tensor) -> Tensor:
    """The plain mean."""
    return torch.ones_like(state.size)


def by_size(state: TokenState, importance: Tensor) -> Tensor:
    """Weighted by how many original tokens each stands for."""
    return state.size


def by_importance(state: TokenState, importance: Tensor) -> Tensor:
    """Weighted by exp(score): the softmax of the scores."""
    return importance.exp()


@dataclass(frozen=True)
class Merge:
    """A merge rule.

    Args:
        mass: (state, importance (B, L)) -> (B, L), the weights by which tokens that become one are averaged.
        into: what each removed token becomes part of: the ``nearest`` of the targets, as the policy's matching finds
            it, ``one`` target for all, the least important, or ``nothing``, which drops it.
        groupings: the names of ``group.GROUPINGS`` it works with, all of them if empty.
    """

    mass: Callable[[TokenState, Tensor], Tensor] = equal
    into: Literal["nearest", "one", "nothing"] = "nearest"
    groupings: tuple[str, ...] = ()

    def compares(self, sources: int, remove: int) -> bool:
        """Whether tokens are compared: where each goes by its nearest target, or which ``remove`` of the sources go."""
        return self.into == "nearest" or sources > remove


MERGES = {
    "mean": Merge(),
    "size": Merge(by_size),
    "fuse": Merge(by_importance, into="one", groupings=("asymmetric",)),
    "prune": Merge(into="nothing"),
}
"""``mean``: merged into the most similar target, a plain mean (MTR). ``size``: the same, weighted by size (ToMe).
``fuse``: all removed tokens become one (EViT). ``prune``: they are dropped."""
