"""The remaining work of a reduced model, and the cost of the policy's own steps."""

from collections.abc import Sequence
from dataclasses import replace

from mtr_lab.backbones import Backbone
from mtr_lab.measure.flops import Work
from mtr_lab.reduction.partial_blocks import SCANS, blocks_alone, sampled_blocks
from mtr_lab.reduction.policy import Policy
from mtr_lab.reduction.settings import EXACT
from mtr_lab.tokens import Layout


def removed_at_embedding(policy: Policy, layout: Layout) -> int:
    """The number of tokens removed from each sequence before the first block."""
    return 0 if policy.cells is None else policy.cells.removes(layout)


def remaining_work(
    policy: Policy,
    model: Backbone,
    remove: Sequence[int],
    layout: Layout,
    skipped: Sequence[Sequence[str]] = (),
) -> Work:
    """The work of a model whose blocks remove that many tokens and skip these paths; ``layout`` is stage 0's."""
    scan = SCANS[policy.paths]
    sampled, repeated = sampled_blocks(model, scan), policy.stretch == EXACT
    work = Work(remove, removed_at_embedding(policy, layout), skipped=skipped, sampled=sampled, repeated=repeated)
    work = replace(work, merged_early=policy.merges_early, remaining=policy.remaining)
    alone = zip(blocks_alone(model, policy.share_alone), remove, strict=True)
    work = replace(work, alone=[is_alone and not count for is_alone, count in alone])
    work = work if scan is None else replace(work, choose_paths=scan.choose)
    return replace(work, grid=policy.grid) if policy.keeps_grid else work


def overhead_flops(
    policy: Policy, model: Backbone, layouts: Sequence[Layout], tokens: Sequence[int], remove: Sequence[int]
) -> int:
    """True FLOPs of the policy's own steps on one image.

    Args:
        layouts: of the stages.
        tokens: how many enter each block.
        remove: how many each block removes.
    """
    flops = _embedding_flops(policy, model, layouts[0]) * layouts[0].sequences
    counts = zip(tokens, remove, strict=True)
    for stage, layout in zip(model.stages, layouts, strict=True):
        for block in stage.blocks:
            entering, removed = next(counts)
            step = policy.step_flops(entering, layout, removed, stage.width)
            if policy.merges_early and hasattr(block.mixer, "merged_width"):
                step += 2 * removed * (block.mixer.merged_width - stage.width)  # in place of the block's output
            flops += step * layout.sequences
    return flops


def _embedding_flops(policy: Policy, model: Backbone, layout: Layout) -> int:
    """For one sequence, before the first block: of the plan, and of merging by it."""
    if policy.cells is None:
        return 0
    return policy.cells.flops(model, layout) + 2 * removed_at_embedding(policy, layout) * model.stages[0].width
