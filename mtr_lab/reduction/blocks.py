"""Which blocks may remove tokens, and how many each may remove."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, takewhile

from mtr_lab.backbones import Backbone
from mtr_lab.errors import UserError, unknown
from mtr_lab.reduction.costs import removed_at_embedding
from mtr_lab.reduction.partial_blocks import SCANS, blocks_alone, sampled_blocks
from mtr_lab.reduction.policy import Policy
from mtr_lab.reduction.resolution import Size
from mtr_lab.tokens import Layout

LAYERS = ("all", "lower", "upper")
WIDENING = "widening"
"""The interval that grows by one from reduction to reduction: blocks 0, 1, 3, 6, 10, … from block 0 on."""


@dataclass(frozen=True)
class BlockInfo:
    """The properties of one block that a schedule depends on."""

    stage: int
    tokens: int
    """Of an unreduced sequence at this block."""
    layout: Layout
    """Of all tokens of the stage, also of those removed before the first block."""
    width: int
    has_evidence: bool
    is_sampled: bool
    """Whether the policy scans one of each 2 x 2 tokens here, for which a full grid has to remain."""
    saves_nothing: bool
    """Whether removing tokens here is useless: no MLP follows the mixer, and the block is the last of its stage or
    tokens merge for MLPs alone."""
    is_alone: bool = False
    """Whether the block computes the special tokens alone, and leaves all others as they are."""
    follow: Callable[[Layout], Layout] | None = None
    """The grid on which the stage before ends -> the layout of this stage; ``None`` if it is ``layout`` always."""


def block_infos(
    model: Backbone, policy: Policy, img_size: Sequence[int] | None = None, resolution: Size | None = None
) -> list[BlockInfo]:
    """An entry per block, for images of (height, width), by default the model's own size, resized to ``resolution``."""
    layouts = model.layouts(resolution or img_size)
    removed = [removed_at_embedding(policy, layouts[0]), *[0] * (len(layouts) - 1)]
    sampled = sampled_blocks(model, SCANS[policy.paths])
    follow = getattr(model, "layout_after", None)
    alone = blocks_alone(model, policy.share_alone)
    blocks = [(number, block) for number, stage in enumerate(model.stages) for block in stage.blocks]
    return [
        BlockInfo(
            stage=number,
            tokens=layouts[number].tokens - removed[number],
            layout=layouts[number],
            width=model.stages[number].width,
            has_evidence=bool(block.mixer.paths) and not is_sampled,
            is_sampled=is_sampled,
            saves_nothing=block.mlp is None and (policy.merges_in_mlp or block is model.stages[number].blocks[-1]),
            is_alone=is_alone,
            follow=None if follow is None else partial(follow, number),
        )
        for (number, block), is_sampled, is_alone in zip(blocks, sampled, alone, strict=True)
    ]


def reducing_blocks(
    infos: Sequence[BlockInfo], policy: Policy, first_block: int, interval: int | str, layers: str = "all"
) -> list[int]:
    """The blocks that reduce, counted from 0: every ``interval``-th one from ``first_block`` on, or at gaps 1, 2, 3, ….

    Left out are the last block of the model, unless tokens merge for its MLP alone, blocks where a removal saves
    nothing, and blocks without the evidence that the policy reads.

    Args:
        layers: ``lower`` or ``upper`` for that half of the blocks alone, as in Famba-V.

    Raises:
        UserError: a value out of its range.
    """
    depth = len(infos)
    if layers not in LAYERS:
        raise unknown("mtr.layers", str(layers), LAYERS)
    if interval != WIDENING and (not isinstance(interval, int) or interval < 1):
        raise UserError(f"mtr.interval must be at least 1, or {WIDENING}, got {interval!r}.")
    end = depth if policy.merges_in_mlp else depth - 1
    start, stop = (depth // 2 if layers == "upper" else 0), (depth // 2 if layers == "lower" else end)
    if depth < 2:
        raise UserError(f"a model of {depth} block cannot be reduced: tokens that its last block removes save nothing.")
    if not isinstance(first_block, int) or not 0 <= first_block < depth - 1 or first_block >= stop:
        raise UserError(f"mtr.first_block must be in [0, {stop - 1}] for {depth} blocks, got {first_block!r}.")
    first = max(first_block, start)
    if isinstance(interval, int):
        candidates: Iterable[int] = range(first, stop, interval)
    else:
        candidates = takewhile(lambda block: block < stop, accumulate(range(1, depth), initial=first))
    return [block for block in candidates if can_reduce(infos[block], policy)]


def can_reduce(info: BlockInfo, policy: Policy) -> bool:
    """Whether it makes sense that the policy removes tokens at this block."""
    return not (info.saves_nothing or info.is_alone) and can_decide(info, policy)


def can_decide(info: BlockInfo, policy: Policy) -> bool:
    """Whether the block has the evidence that the policy reads, and leaves a full grid where one is needed."""
    return (info.has_evidence or not policy.needs) and (policy.keeps_grid or not info.is_sampled)


def possible_counts(policy: Policy, wanted: Iterable[int], infos: Sequence[BlockInfo]) -> list[int]:
    """The most tokens that the policy can remove at each block, up to the wanted number."""
    return [possible for _, _, possible in possible_removals(policy, wanted, infos)]


def possible_removals(
    policy: Policy, wanted: Iterable[int], infos: Sequence[BlockInfo]
) -> Iterator[tuple[int, Layout, int]]:
    """For each block the tokens that enter it, the layout of its stage, and the count as of ``possible_counts``."""
    stage, length, layout = -1, 0, infos[0].layout
    for count, info in zip(wanted, infos, strict=True):
        if info.stage != stage and info.follow is not None and stage >= 0:
            layout = info.follow(policy.grid(layout, length))
            length = layout.tokens
        elif info.stage != stage:
            length, layout = info.tokens, info.layout
        stage, possible = info.stage, policy.possible(count, length, layout) if count else 0
        yield length, layout, possible
        length = policy.remaining(length, possible)
