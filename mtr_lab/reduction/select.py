"""Which of the candidate sources go: those of the least weighted distance from their targets. B images, L tokens."""

from collections.abc import Callable

from torch import Tensor

from mtr_lab.tokens import TokenState

SELECTIONS: dict[str, Callable[[TokenState, Tensor], Tensor] | None] = {
    "similarity": None,
    "size": lambda state, importance: state.size,
    "score": lambda state, importance: importance,
}
"""(state, importance (B, L)) -> (B, L), the factor of a token's distance from its target, ``None`` for 1.
``similarity``: the most similar tokens go. ``size``: those whose patches move the least in sum, size · (1 - cosine).
``score``: the unimportant and similar ones, score · (1 - cosine)."""
