"""Which target each candidate source is merged into, and how alike they are."""

from collections.abc import Callable

from torch import Tensor

from mtr_lab import ops
from mtr_lab.tokens import TokenState

MATCHINGS = {"cosine": ops.nearest}
"""features (B, L, C), candidates (B, A) and targets (B, T) -> the target of each candidate, and their similarity."""

FEATURES: dict[str, Callable[[TokenState], Tensor]] = {
    "stream": lambda state: state.stream,
    "hidden": lambda state: state.hidden,
    "residual": lambda state: state.hidden if state.residual is None else state.residual,
}
"""What is compared, (B, L, C): the residual stream after the block, the block's output alone, the stream before it."""
