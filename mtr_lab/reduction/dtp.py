"""``mtr.schedule=dtp``: two blocks reduce, chosen by the scores of a few unlabelled images in one forward pass.

After DTP (ICLR 2026), which prunes in Mamba language-vision models by the mean of Δ. The early block is the one with
the least standard deviation of scores in the first quarter of the blocks. The late one follows the block with the
largest rise of it in the last 30 %. Left open by the source and chosen here: the policy's own score, the standard
deviation over the tokens of an image (special ones left out), its mean over images, and equal counts in both blocks.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mtr_lab.backbones import Backbone, blocks_of, last_state
from mtr_lab.errors import UserError
from mtr_lab.reduction.active import ActiveBlockReduction, ActiveReduction
from mtr_lab.reduction.blocks import BlockInfo, can_decide, can_reduce
from mtr_lab.reduction.policy import Policy
from mtr_lab.reduction.schedule import Schedule
from mtr_lab.tokens import Evidence, TokenState
from mtr_lab.tokens.pooling import ordinary_tokens


class _Recorder(ActiveBlockReduction):
    """Removes nothing, and records the standard deviation of a block's scores."""

    def __init__(self, active: ActiveReduction, block: int) -> None:
        super().__init__(active, block)
        self._policy = active.policy
        self.deviation = math.nan

    @property
    def needs(self) -> tuple[str, ...]:
        """The evidence of the score."""
        return self._policy.needs

    def after_mixer(self, state: TokenState, evidence: Evidence) -> TokenState:
        """The tokens as they are."""
        score = self._policy.importance(state, evidence)
        tokens = ordinary_tokens(state.special, score.shape[1])
        self.deviation = score.gather(1, tokens).std(dim=1).mean().item()
        return state


@torch.no_grad()
def deviations(
    model: Backbone, policy: Policy, infos: Sequence[BlockInfo], unreduced: Schedule, images: Tensor
) -> list[float]:
    """The standard deviation of the scores in each block of the unreduced model, NaN in blocks without evidence.

    Args:
        images: (B, channels, H, W), unlabelled, preprocessed and on the model's device.

    Raises:
        UserError: the policy has no score.
    """
    if policy.score.removeprefix("-") == "none":
        raise UserError(
            "mtr.schedule=dtp needs the scores of tokens, and mtr.score=none gives none: choose another score, or "
            "another schedule."
        )
    active, blocks = ActiveReduction(policy, unreduced), blocks_of(model)
    before, reductions = model.reduction, [block.reduction for block in blocks]
    recorders = [_Recorder(active, number) for number in range(len(blocks))]
    try:
        model.reduction = active
        for block, recorder, info in zip(blocks, recorders, infos, strict=True):
            block.reduction = recorder if can_decide(info, policy) else None
        last_state(model, images)
    finally:
        model.reduction = before
        for block, reduction in zip(blocks, reductions, strict=True):
            block.reduction = reduction
    return [recorder.deviation for recorder in recorders]


def two_blocks(deviation: Sequence[float], infos: Sequence[BlockInfo], policy: Policy) -> list[int]:
    """The early and the late block, of those where the policy can reduce; one block if they are the same.

    Raises:
        UserError: no block of the first quarter can reduce.
    """
    depth = len(deviation)
    able = [block for block, info in enumerate(infos) if can_reduce(info, policy)]
    early = [block for block in able if block < math.ceil(depth / 4)]
    if not early:
        raise UserError("mtr.schedule=dtp reduces in the first quarter of the blocks, where this policy cannot reduce.")
    rise = {
        block: deviation[block] - deviation[block - 1]
        for block in range(max(1, depth - math.ceil(0.3 * depth)), depth)
        if not math.isnan(deviation[block] - deviation[block - 1])
    }
    after = max(rise, key=lambda block: rise[block]) + 1 if rise else depth
    late = max(block for block in able if block <= max(after, early[0]))
    return sorted({min(early, key=lambda block: deviation[block]), late})
