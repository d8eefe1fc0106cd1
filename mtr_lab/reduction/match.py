"""The most similar target of each candidate source, and their similarity."""

from collections.abc import Callable

from torch import Tensor

from mtr_lab import ops
from mtr_lab.tokens import TokenState

MATCHINGS = {"cosine": ops.nearest}
"""features (B, L, C), positions of sources (B, A) and of targets (B, T) -> target of each source and similarity, (B, A)
each."""

FEATURES: dict[str, Callable[[TokenState], Tensor]] = {
    "stream": lambda state: state.stream,
    "hidden": lambda state: state.hidden,
    "residual": lambda state: state.hidden if state.residual is None else state.residual,
}
"""The vectors that are compared, (B, L, C): the residual stream after the block, the output of the block alone, or the
residual stream before the block."""
