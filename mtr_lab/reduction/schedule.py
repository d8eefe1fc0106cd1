"""The number of tokens to remove at each block, for a given share of the FLOPs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mtr_lab.backbones import Backbone
from mtr_lab.errors import UserError
from mtr_lab.measure.flops import model_costs, remaining_layouts
from mtr_lab.reduction.blocks import (
    BlockInfo,
    block_infos,
    can_decide,
    can_reduce,
    possible_counts,
    possible_removals,
    reducing_blocks,
)
from mtr_lab.reduction.costs import overhead_flops, remaining_work
from mtr_lab.reduction.lines import removals
from mtr_lab.reduction.policy import Policy
from mtr_lab.reduction.resolution import AUTO, Size

DTP = "dtp"
"""Two blocks reduce, which ``Reduction.solve`` chooses by the scores on images; see ``mtr_lab.reduction.dtp``."""
# ``auto`` is also the schedule that ``Reduction.solve`` measures, see ``sensitivity.GreedySearch``.
MEASURED = {AUTO: "how removing tokens changes the output", DTP: "how much the scores of tokens differ"}
"""What the schedules measure that need images."""
NO_TOKENS = "none"
"""The schedule in which no block removes tokens: the policy acts at other places, or on the size of the picture."""
SHAPES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda i, n: 1.0,
    "linear": lambda i, n: (n - i) / n,
    "front": lambda i, n: 0.5**i,
    "early": lambda i, n: 0.7**i,
}
"""The relative count of reduction i of n: equal counts, linearly falling ones, each half (``early``: 0.7) of the one
before. In a pyramid these are shares of the tokens of a stage."""


class OutOfReach(UserError):
    """The policy cannot remove that share of the FLOPs."""


@dataclass(frozen=True)
class Schedule:
    """Token counts of a reduced model and their cost; FLOPs are true FLOPs of one image."""

    remove: tuple[int, ...]
    """How many tokens each block removes."""
    tokens: tuple[int, ...]
    """How many tokens enter each block."""
    flops: int
    """Of the backbone and the class head at these token counts."""
    flops_overhead: int
    """Of the policy's own steps."""
    flops_unreduced: int
    """Of the unreduced backbone and class head."""
    flops_literature: int
    """Of the backbone and the class head, as the literature counts them."""
    exponentials: int
    """exp(Δ A) of all scans."""
    at_other_places: bool
    """Whether the policy acts at other places than after mixers, too."""
    resolution: Size | None = None
    """(height, width) to which the picture is resized first, or (frames, height, width) to which the video is
    shortened; ``None``: neither."""
    skipped: tuple[tuple[str, ...], ...] = ()
    """For each block the names of the scan paths that it skips; empty: all blocks scan what the policy lets them."""

    @property
    def acts(self) -> bool:
        """Whether the model computes anything else than the unreduced one."""
        return self.at_other_places or self.resolution is not None or any(self.remove)

    @property
    def reduction(self) -> float:
        """The share of the unreduced FLOPs that is saved, the policy's own steps charged."""
        return 1 - (self.flops + self.flops_overhead) / self.flops_unreduced


def make_schedule(
    model: Backbone,
    policy: Policy,
    *,
    ratio: float | None = None,
    schedule: str | Sequence[int] | Mapping[int, float] = "constant",
    first_block: int = 1,
    interval: int | str = 2,
    layers: str = "all",
    img_size: Size | None = None,
    resolution: Size | None = None,
    skipped: tuple[tuple[str, ...], ...] = (),
) -> Schedule:
    """Token counts for a FLOPs reduction, or the cost of given counts.

    Args:
        ratio: share of the unreduced FLOPs to remove; ``None`` if ``schedule`` gives the counts. Never less is removed
            than asked, and the overshoot is below the cost of one token: one token more at the last reducing block
            would miss the ratio.
        schedule: how the counts of the reducing blocks relate, as far as whole numbers allow and until a block can
            remove no more: a name of ``SHAPES``, or a weight > 0 for each reducing block. Or the counts themselves,
            one for each block. Or ``none``: no block removes tokens.
        first_block, interval, layers: which blocks reduce, for a named schedule; see ``reducing_blocks``.
        img_size: (height, width) of the images, the model's own by default.
        resolution: (height, width) to which the picture is resized before the model, or (frames, height, width) of a
            shortened video, which counts towards the ratio.
        skipped: for each block the names of the scan paths that it skips, which counts towards the ratio.

    Raises:
        OutOfReach: the ratio cannot be reached; states the maximum.
        UserError: an impossible setting, counts beyond what a block can remove, or both a ratio and
            counts.
    """
    acting = policy if policy.acts_at_other_places and ratio != 0 else policy.only_after_mixers()
    resolution, skipped = (None, ()) if ratio == 0 else (resolution, skipped)
    infos = block_infos(model, acting, img_size, resolution)
    size = resolution or img_size
    depth, unreduced = len(infos), model_costs(model, img_size=img_size)[0].flops

    def cost(remove: Sequence[int]) -> Schedule:
        work = remaining_work(acting, model, remove, infos[0].layout, skipped)
        (costs, tokens), layouts = model_costs(model, work, size), remaining_layouts(model, work, size)
        return Schedule(
            remove=tuple(remove),
            tokens=tuple(tokens),
            flops=costs.flops,
            flops_overhead=overhead_flops(acting, model, layouts, tokens, remove),
            flops_unreduced=unreduced,
            flops_literature=costs.literature,
            exponentials=costs.exponentials,
            at_other_places=acting.acts_at_other_places,
            resolution=resolution,
            skipped=skipped,
        )

    if isinstance(schedule, Sequence) and not isinstance(schedule, str):
        if ratio is not None:
            raise UserError(
                f"mtr.schedule gives the counts itself ({depth}, one per block; got {len(schedule)}), not mtr.ratio: "
                "add mtr.ratio=null (in Python: ratio=None), or leave mtr.schedule out."
            )
        counts: list[int] = list(schedule)
        _check_counts(counts, policy, infos)
        return cost(counts)
    if ratio is None or isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
        raise UserError(f"mtr.ratio must be a share of the FLOPs in [0, 1), got {ratio!r}.")
    if isinstance(schedule, str) and schedule in MEASURED:
        raise UserError(
            f"mtr.schedule={schedule} measures on images {MEASURED[schedule]}, and got none: pass about a "
            "hundred as patch(…, images=images): unlabelled, preprocessed, and not the evaluation's."
        )
    if not isinstance(schedule, Mapping) and schedule not in (*SHAPES, NO_TOKENS):
        raise UserError(
            f"mtr.schedule must be one of {', '.join([*SHAPES, NO_TOKENS, *MEASURED])} or a list of {depth} counts, "
            f"got {schedule!r}."
        )
    if ratio == 0:
        return cost([0] * depth)
    if schedule == NO_TOKENS:
        return _enough(cost([0] * depth), ratio)
    if isinstance(schedule, Mapping):
        _check_weights(schedule, [can_reduce(info, policy) for info in infos])
        shape = {block: schedule[block] / max(schedule.values()) for block in sorted(schedule)}
    else:
        blocks = reducing_blocks(infos, policy, first_block, interval, layers)
        longest = max(info.tokens for info in infos)
        shape = {
            block: SHAPES[schedule](i, len(blocks)) * infos[block].tokens / longest for i, block in enumerate(blocks)
        }

    def limited(wanted: Mapping[int, int]) -> Schedule:
        """The schedule of these counts by block, each limited to what the block can remove."""
        return cost(possible_counts(policy, [wanted.get(block, 0) for block in range(depth)], infos))

    length = max(info.tokens for info in infos)
    reducible = [block for block, info in enumerate(infos) if can_reduce(info, policy)]
    most = (lambda: limited(dict.fromkeys(reducible, length)).reduction) if len(shape) < len(reducible) else None
    return _solve(ratio, shape, length, limited, most)


def _enough(schedule: Schedule, ratio: float) -> Schedule:
    """The schedule without removed tokens; raises a ``UserError`` unless it reaches the ratio."""
    if schedule.reduction < ratio:
        most = max(_floor(schedule.reduction), 0.0)
        raise OutOfReach(
            f"mtr.ratio={ratio} is out of reach: at most {most} of the FLOPs can be removed with mtr.schedule=none, in "
            "which no block removes tokens. Lower the ratio, choose a smaller mtr.resolution (auto: the largest that "
            "is enough), or another schedule."
        )
    return schedule


def _solve(
    ratio: float,
    shape: Mapping[int, float],
    length: int,
    limited: Callable[[Mapping[int, int]], Schedule],
    most: Callable[[], float] | None,
) -> Schedule:
    """Scale the shape up to the first step that reaches the ratio, then keep tokens again, one by one.

    ``most``: the largest reduction by all blocks that could reduce; ``None`` if no others could.
    """
    wanted = dict.fromkeys(shape, 0)
    reached = limited(wanted)
    best = reached.reduction
    if best >= ratio:  # by what the policy does at other places
        return reached
    for scale in range(1, length):
        enough = {block: math.ceil(scale * part) for block, part in shape.items()}
        reached = limited(enough)
        best = max(best, reached.reduction)
        if reached.reduction >= ratio:
            break
        wanted = enough
    else:
        remedy, all_blocks = "Lower it.", 0.0 if most is None else most()
        if all_blocks > best:
            remedy = (
                "Lower the ratio, or reduce in more blocks (mtr.first_block, mtr.interval): all that can reduce "
                f"reach {_floor(all_blocks)}."
            )
        raise OutOfReach(
            f"mtr.ratio={ratio} is out of reach: at most {_floor(best)} of the FLOPs can be removed when the blocks "
            f"{list(shape)} reduce. {remedy}"
        )
    # The step before is too little. Take this step's counts block by block, the earliest (dearest) first, as long as
    # the ratio is still missed; then add one token at the block where this overshoots least.
    for block in shape:
        if limited({**wanted, block: enough[block]}).reduction < ratio:
            wanted[block] = enough[block]
    trials = [limited({**wanted, block: wanted[block] + 1}) for block in shape]
    best_trial = min([t for t in trials if t.reduction >= ratio] or [reached], key=lambda trial: trial.reduction)
    while True:  # where blocks have reached their limits, the overshoot may be larger: trim the last reduction
        remove = {block: count for block, count in enumerate(best_trial.remove) if count}
        remove[max(remove)] -= 1
        trial = limited(remove)
        if trial.reduction < ratio:
            return best_trial
        best_trial = trial


def _floor(share: float) -> float:
    """Rounded down to four digits."""
    return math.floor(share * 1e4) / 1e4


def _check_weights(weights: Mapping[int, float], can_reduce: Sequence[bool]) -> None:
    allowed = [block for block, can in enumerate(can_reduce) if can]
    numbers = all(isinstance(number, int | float) for pair in weights.items() for number in pair)
    if not weights or not numbers or not all(b in allowed and 0 < w < math.inf for b, w in weights.items()):
        blocks = f"0 to {allowed[-1]}" if allowed == list(range(len(allowed))) else str(allowed)
        raise UserError(
            f"mtr.schedule must give a weight above 0 for each block that reduces, of {blocks}, got {weights}."
        )


def _check_counts(counts: list[int], policy: Policy, infos: Sequence[BlockInfo]) -> None:
    if len(counts) != len(infos) or not all(isinstance(count, int) and count >= 0 for count in counts):
        raise UserError(f"mtr.schedule must hold {len(infos)} counts ≥ 0, one per block, got {counts}.")
    places = possible_removals(policy, counts, infos)
    for block, (count, (left, layout, most), info) in enumerate(zip(counts, places, infos, strict=True)):
        if count > most:
            choice = f"at most {most}"
            if policy.keeps_grid:
                choice = " or ".join(map(str, removals(left, layout))) + ", in whole rows and columns"
            raise UserError(
                f"mtr.schedule removes {count} tokens after block {block}: of the {left} there, {policy.policy} can "
                f"remove {choice}."
            )
        if count and policy.merges_in_mlp and info.saves_nothing:
            raise UserError(
                f"mtr.schedule removes tokens at block {block}, which has no MLP for mtr.merge_at={policy.merge_at}: "
                "set its count to 0."
            )
        if count and not can_decide(info, policy):
            if info.is_sampled and not policy.needs:
                raise UserError(
                    f"mtr.schedule removes tokens after block {block}, and mtr.paths={policy.paths} scans one of "
                    "each 2 x 2 tokens there, for which a full grid has to remain: set its count to 0, or "
                    "mtr.grouping=lines."
                )
            raise UserError(
                f"mtr.schedule removes tokens after block {block}, whose mixer shows no evidence for "
                f"mtr.score={policy.score}: set its count to 0, or choose another score."
            )
