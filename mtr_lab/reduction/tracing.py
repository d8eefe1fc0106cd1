"""Record what each block does to the tokens of some images."""

from dataclasses import dataclass

from torch import Tensor, nn

from mtr_lab.backbones import as_backbone, first_state, run
from mtr_lab.reduction.active import ActiveReduction
from mtr_lab.tokens import TokenState


@dataclass(frozen=True)
class TracedBlock:
    """The effect of one block on the tokens of B images."""

    before: TokenState
    """The L tokens that enter the block."""
    after: TokenState
    """The tokens that leave it. ``source[b, i]`` is the token that now contains original token i of image b, -1 if it
    was dropped."""
    score: Tensor | None
    """(B, L) float32, the importance by which the policy chose among the tokens that enter. ``None`` if the block
    removes nothing or the policy chooses by similarity alone."""


def trace(model: nn.Module, images: Tensor) -> list[TokenState]:
    """Run the blocks and record the state after each: the positions of all tokens, and what they were merged from.

    Args:
        images: (B, channels, H, W), or videos (B, channels, T, H, W) for a model of videos.

    Returns:
        One state a block; ``source[b, i]`` is the token that now contains original token i of image b, -1 if it was
        dropped.
    """
    return [block.after for block in _trace(model, images, "trace")]


def trace_blocks(model: nn.Module, images: Tensor) -> list[TracedBlock]:
    """As ``trace``, with the state before each block and the score by which the policy chose."""
    return _trace(model, images, "trace_blocks")


def _trace(model: nn.Module, images: Tensor, caller: str) -> list[TracedBlock]:
    backbone = as_backbone(model, caller)
    active = backbone.reduction
    scores: list[Tensor] = []  # of the block that is running, at most one
    if isinstance(active, ActiveReduction):
        active.record_score = scores.append
    try:
        return [
            TracedBlock(before.applied(), after.applied(), scores.pop() if scores else None)
            for before, after in run(backbone, first_state(backbone, images, traced=True))
        ]
    finally:
        if isinstance(active, ActiveReduction):
            active.record_score = None
