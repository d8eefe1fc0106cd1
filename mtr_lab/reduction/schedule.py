"""How many tokens to remove at which block, so that a given share of the FLOPs goes."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mtr_lab.backbones import Backbone, blocks_of
from mtr_lab.errors import UserError, unknown
from mtr_lab.measure.flops import model_costs
from mtr_lab.reduction.policy import Policy

AUTO = "auto"
"""The schedule that ``Reduction.solve`` measures; see ``sensitivity.GreedySearch``."""
LAYERS = ("all", "lower", "upper")
SHAPES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda i, n: 1.0,
    "linear": lambda i, n: (n - i) / n,
    "front": lambda i, n: 0.5**i,
}
"""How the counts of n reductions relate, by the reduction's number i: equal, falling linearly, halving each time."""


@dataclass(frozen=True)
class Schedule:
    """Token counts of a reduced model and what they cost; FLOPs are true ones, of one image."""

    remove: tuple[int, ...]
    """How many tokens each block removes."""
    tokens: tuple[int, ...]
    """How many tokens enter each block."""
    flops: int
    """Of the backbone and class head at these token counts."""
    flops_overhead: int
    """Of the reduction's own steps."""
    flops_unreduced: int
    flops_literature: int
    """Of the backbone and class head as the literature counts them."""
    exponentials: int
    """exp(Δ A) of all scans."""
    at_other_places: bool
    """Whether the policy acts at other places than after mixers, too."""

    @property
    def acts(self) -> bool:
        """Whether anything differs from the unreduced model."""
        return self.at_other_places or any(self.remove)

    @property
    def reduction(self) -> float:
        """The share of the unreduced FLOPs that is gone, the reduction's own cost charged."""
        return 1 - (self.flops + self.flops_overhead) / self.flops_unreduced


@dataclass(frozen=True)
class BlockInfo:
    """What a schedule has to know about one block."""

    stage: int
    tokens: int
    """Of an unreduced sequence there."""
    special: int
    """How many of them are special."""
    sequences: int
    """Of one image."""
    width: int
    has_evidence: bool
    is_last: bool
    """Whether removing a token saves nothing: it is the last of its stage, and no MLP follows its mixer."""


def block_infos(model: Backbone, policy: Policy, img_size: Sequence[int] | None = None) -> list[BlockInfo]:
    """The infos of all blocks for images of (height, width), by default the model's own size."""
    layouts = model.layouts(policy.picture_size(model, img_size))
    embedding = [policy.removed_at_embedding(layouts[0]), *[0] * (len(layouts) - 1)]
    return [
        BlockInfo(
            number,
            layout.tokens - gone,
            len(layout.special),
            layout.sequences,
            stage.width,
            bool(block.mixer.paths),
            block is stage.blocks[-1] and block.mlp is None,
        )
        for number, (stage, layout, gone) in enumerate(zip(model.stages, layouts, embedding, strict=True))
        for block in stage.blocks
    ]


def reducing_blocks(
    infos: Sequence[BlockInfo], policy: Policy, first_block: int, interval: int, layers: str = "all"
) -> list[int]:
    """The blocks that reduce, from 0: not the last one of the model or, unless an MLP follows its mixer, of a stage.

    Nor one that lacks the evidence the policy reads.

    ``layers`` narrows them to the ``lower`` or the ``upper`` half of the model, as Famba-V does.
    """
    depth = len(infos)
    if layers not in LAYERS:
        raise unknown("mtr.layers", str(layers), LAYERS)
    if not isinstance(interval, int) or interval < 1:
        raise UserError(f"mtr.interval must be at least 1, got {interval!r}.")
    start, stop = (depth // 2 if layers == "upper" else 0), (depth // 2 if layers == "lower" else depth - 1)
    if not isinstance(first_block, int) or not 0 <= first_block < depth - 1 or first_block >= stop:
        raise UserError(f"mtr.first_block must be in [0, {stop - 1}] for {depth} blocks, got {first_block!r}.")
    candidates = range(max(first_block, start), stop, interval)
    return [block for block in candidates if _can_reduce(infos[block], policy)]


def _can_reduce(info: BlockInfo, policy: Policy) -> bool:
    return not info.is_last and (info.has_evidence or not policy.needs)


def possible_counts(policy: Policy, wanted: Iterable[int], infos: Sequence[BlockInfo]) -> list[int]:
    """As many of the tokens wanted after each block as can go."""
    counts: list[int] = []
    stage, length = -1, 0
    for count, info in zip(wanted, infos, strict=True):
        if info.stage != stage:
            stage, length = info.stage, info.tokens
        counts.append(min(count, policy.capacity(length, info.special)) if count else 0)
        length -= counts[-1]
    return counts


def make_schedule(
    model: Backbone,
    policy: Policy,
    *,
    ratio: float | None = None,
    schedule: str | Sequence[int] | Mapping[int, float] = "constant",
    first_block: int = 1,
    interval: int = 2,
    layers: str = "all",
    img_size: tuple[int, int] | None = None,
) -> Schedule:
    """Token counts for a FLOPs reduction, or the cost of given counts.

    Args:
        ratio: share of the unreduced FLOPs to remove. Never less is removed than asked, and the overshoot is below
            the cost of one token at the last block that reduces: with one token more kept there, it would not be
            enough. None if ``schedule`` gives the counts.
        schedule: a name of ``SHAPES``, how the numbers removed at the reducing blocks relate as far as integers allow
            it, until nothing more can go; the same as a weight > 0 for each block that reduces; or the number to remove
            after each block.
        first_block, interval, layers: which blocks reduce, for a named schedule; see ``reducing_blocks``.
        img_size: (height, width) of the images, the model's own by default.

    Raises:
        UserError: a ratio beyond what can be reached (states the maximum), counts that remove more than there is, or
            both a ratio and counts.
    """
    at_other_places = policy.acts_at_other_places and ratio != 0
    infos = block_infos(model, policy if at_other_places else policy.only_after_mixers(), img_size)
    depth, unreduced = len(infos), model_costs(model, img_size=img_size)[0].flops

    def cost(remove: Sequence[int]) -> Schedule:
        acting = policy if at_other_places else policy.only_after_mixers()
        size = acting.picture_size(model, img_size)
        layout = model.layouts(size)[0]
        costs, tokens = model_costs(model, acting.work(remove, layout), size)
        own = acting.embedding_flops(layout, model.stages[0].width) * layout.sequences
        for block, n, count, info in zip(blocks_of(model), tokens, remove, infos, strict=True):
            step = policy.flops(n, info.special, count, info.width)
            if block.mlp is not None:
                step += acting.mlp_flops(n - count, info.special, info.width)
            own += step * info.sequences
        return Schedule(
            tuple(remove),
            tuple(tokens),
            costs.flops,
            own,
            unreduced,
            costs.literature,
            costs.exponentials,
            at_other_places,
        )

    if isinstance(schedule, Sequence) and not isinstance(schedule, str):
        if ratio is not None:
            raise UserError("mtr.schedule gives the counts itself: set mtr.ratio=null, or use mtr.schedule=constant.")
        counts: list[int] = list(schedule)
        _check_counts(counts, policy, infos)
        return cost(counts)
    if ratio is None or isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
        raise UserError(f"mtr.ratio must be a share of the FLOPs in [0, 1), got {ratio!r}.")
    if schedule == AUTO:
        raise UserError(
            "mtr.schedule=auto measures on images what removing tokens does to the output, and was given none: pass "
            "about a hundred, unlabelled, preprocessed and not those to evaluate on, as patch(…, images=images)."
        )
    if not isinstance(schedule, Mapping) and schedule not in SHAPES:
        raise UserError(
            f"mtr.schedule must be one of {', '.join([*SHAPES, AUTO])} or a list of {depth} counts, got {schedule!r}."
        )
    if ratio == 0:
        return cost([0] * depth)
    if isinstance(schedule, Mapping):
        _check_weights(schedule, [_can_reduce(info, policy) for info in infos])
        shape = {block: schedule[block] / max(schedule.values()) for block in sorted(schedule)}
    else:
        blocks = reducing_blocks(infos, policy, first_block, interval, layers)
        shape = {block: SHAPES[schedule](i, len(blocks)) for i, block in enumerate(blocks)}

    def at(wanted: Mapping[int, int]) -> Schedule:
        """As many of the wanted tokens as can go, block by block."""
        return cost(possible_counts(policy, [wanted.get(block, 0) for block in range(depth)], infos))

    return _solve(ratio, shape, max(info.tokens for info in infos), at, cost)


def _solve(
    ratio: float,
    shape: Mapping[int, float],
    length: int,
    at: Callable[[Mapping[int, int]], Schedule],
    cost: Callable[[Sequence[int]], Schedule],
) -> Schedule:
    """Scale the shape up to the first step that is enough, then take back what is too much, token by token."""
    wanted = dict.fromkeys(shape, 0)
    reached = at(wanted)
    best = reached.reduction
    if best >= ratio:  # by what the policy does at other places
        return reached
    for scale in range(1, length):
        enough = {block: math.ceil(scale * part) for block, part in shape.items()}
        reached = at(enough)
        best = max(best, reached.reduction)
        if reached.reduction >= ratio:
            break
        wanted = enough
    else:
        most = math.floor(best * 1e4) / 1e4
        raise UserError(
            f"mtr.ratio={ratio} is out of reach: at most {most} of the FLOPs can be removed when the blocks "
            f"{list(shape)} reduce. Lower the ratio, or reduce earlier (mtr.first_block, mtr.interval)."
        )
    # One step less is not enough: add tokens again, at the earliest (dearest) blocks first, as long as it still is not;
    # then take the one token more that overshoots least.
    for block in shape:
        if at({**wanted, block: enough[block]}).reduction < ratio:
            wanted[block] = enough[block]
    trials = [at({**wanted, block: wanted[block] + 1}) for block in shape]
    found = min([t for t in trials if t.reduction >= ratio] or [reached], key=lambda trial: trial.reduction)
    while True:  # where tokens have run out, moving one between blocks is coarse: trim the last reduction instead
        remove = list(found.remove)
        remove[max(block for block, count in enumerate(remove) if count)] -= 1
        trial = cost(remove)
        if trial.reduction < ratio:
            return found
        found = trial


def _check_weights(weights: Mapping[int, float], can_reduce: Sequence[bool]) -> None:
    allowed = [block for block, can in enumerate(can_reduce) if can]
    numbers = all(isinstance(number, int | float) for pair in weights.items() for number in pair)
    if not weights or not numbers or not all(b in allowed and 0 < w < math.inf for b, w in weights.items()):
        these = f"0 to {allowed[-1]}" if allowed == list(range(len(allowed))) else str(allowed)
        raise UserError(
            f"mtr.schedule must give a weight above 0 for each block that reduces, of {these}, got {weights}."
        )


def _check_counts(counts: list[int], policy: Policy, infos: Sequence[BlockInfo]) -> None:
    if len(counts) != len(infos) or not all(isinstance(count, int) and count >= 0 for count in counts):
        raise UserError(f"mtr.schedule must hold {len(infos)} counts ≥ 0, one a block, got {counts}.")
    possible = possible_counts(policy, counts, infos)
    for block, (count, most) in enumerate(zip(counts, possible, strict=True)):
        if count > most:
            info = infos[block]
            gone = sum(n for n, other in zip(counts[:block], infos, strict=False) if other.stage == info.stage)
            raise UserError(
                f"mtr.schedule removes {count} tokens after block {block}: of the {info.tokens - gone} there, "
                f"{policy.policy} can remove at most {most}."
            )
        if count and not (infos[block].has_evidence or not policy.needs):
            raise UserError(
                f"mtr.schedule removes tokens after block {block}, whose mixer shows no evidence for "
                f"mtr.score={policy.score}: set its count to 0, or choose another score."
            )
