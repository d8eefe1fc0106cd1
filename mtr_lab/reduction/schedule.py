"""How many tokens to remove at which block, so that a given share of the FLOPs goes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mtr_lab.backbones import VisionMamba
from mtr_lab.errors import UserError
from mtr_lab.measure.flops import model_flops, num_tokens
from mtr_lab.reduction.policy import Policy


@dataclass(frozen=True)
class Schedule:
    """Token counts of a reduced model and what they cost; FLOPs are true ones, of one image."""

    remove: tuple[int, ...]
    """How many tokens each block removes."""
    tokens: tuple[int, ...]
    """How many tokens enter each block."""
    flops: int
    """Of the backbone and class head at these token counts."""
    flops_reduction: int
    """Of the reduction's own steps."""
    flops_unreduced: int

    @property
    def reduction(self) -> float:
        """The share of the unreduced FLOPs that is gone, the reduction's own cost charged."""
        return 1 - (self.flops + self.flops_reduction) / self.flops_unreduced


def reducing_blocks(depth: int, first_block: int, interval: int) -> range:
    """The blocks that reduce, from 0; never the last one, after which removing a token saves nothing."""
    if not isinstance(interval, int) or interval < 1:
        raise UserError(f"mtr.interval must be at least 1, got {interval!r}.")
    if not isinstance(first_block, int) or not 0 <= first_block < depth - 1:
        raise UserError(f"mtr.first_block must be in [0, {depth - 2}] for {depth} blocks, got {first_block!r}.")
    return range(first_block, depth - 1, interval)


def make_schedule(
    model: VisionMamba,
    policy: Policy,
    *,
    ratio: float | None = None,
    schedule: str | Sequence[int] = "constant",
    first_block: int = 1,
    interval: int = 2,
    img_size: tuple[int, int] | None = None,
) -> Schedule:
    """Token counts for a FLOPs reduction, or the cost of given counts.

    Args:
        ratio: share of the unreduced FLOPs to remove. Never less is removed than asked, and the overshoot is below
            the cost of one token at the last block that reduces: with one token more kept there, it would not be
            enough. None if ``schedule`` gives the counts.
        schedule: ``"constant"``, as equal a number of tokens as integers allow at each reducing block until only one
            ordinary token is left; or the number to remove after each block.
        first_block, interval: which blocks reduce, for a named schedule.
        img_size: (height, width) of the images, the model's own by default.

    Raises:
        UserError: a ratio beyond what can be reached (states the maximum), counts that remove more than there is, or
            both a ratio and counts.
    """
    depth, special = len(model.blocks), 1
    length = num_tokens(model, img_size)

    def cost(remove: Sequence[int]) -> Schedule:
        tokens = [length - sum(remove[:i]) for i in range(depth)]
        steps = zip(tokens, remove, strict=True)
        own = sum(policy.flops(n, special, r, model.embed_dim) for n, r in steps)
        unreduced = model_flops(model, [length] * depth)
        return Schedule(tuple(remove), tuple(tokens), model_flops(model, tokens), own, unreduced)

    if not isinstance(schedule, str):
        if ratio is not None:
            raise UserError("mtr.schedule gives the counts itself: set mtr.ratio=null, or use mtr.schedule=constant.")
        _check_counts(list(schedule), depth, length - special)
        return cost(list(schedule))
    if schedule != "constant":
        raise UserError(f"mtr.schedule must be 'constant' or a list of {depth} counts, got {schedule!r}.")
    if ratio is None or isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
        raise UserError(f"mtr.ratio must be a share of the FLOPs in [0, 1), got {ratio!r}.")
    if ratio == 0:
        return cost([0] * depth)
    blocks = reducing_blocks(depth, first_block, interval)
    return _solve(ratio, blocks, depth, length - special - 1, cost)


def _solve(
    ratio: float, blocks: range, depth: int, available: int, cost: Callable[[Sequence[int]], Schedule]
) -> Schedule:
    def counts(wanted: dict[int, int]) -> list[int]:
        """As many of the wanted tokens as there are, block by block."""
        remove, left = [0] * depth, available
        for block in blocks:
            remove[block] = min(wanted[block], left)
            left -= remove[block]
        return remove

    def at(wanted: dict[int, int]) -> Schedule:
        return cost(counts(wanted))

    reached, constant, best = None, 0, 0.0
    for constant in range(1, available + 1):
        trial = at(dict.fromkeys(blocks, constant))
        best = max(best, trial.reduction)
        if trial.reduction >= ratio:
            reached = trial
            break
    if reached is None:
        raise UserError(
            f"mtr.ratio={ratio} is out of reach: at most {best:.4f} of the FLOPs can be removed when the blocks "
            f"{list(blocks)} reduce. Lower the ratio, or reduce earlier (mtr.first_block, mtr.interval)."
        )

    # One token fewer at every block is not enough: give tokens back, to the earliest (dearest) blocks first, as long
    # as it is still not enough; then take the one token more that overshoots least.
    wanted = dict.fromkeys(blocks, constant - 1)
    for block in blocks:
        trial = at({**wanted, block: constant})
        if trial.reduction < ratio:
            wanted[block] = constant
    trials = [at({**wanted, block: wanted[block] + 1}) for block in blocks]
    enough = [trial for trial in trials if trial.reduction >= ratio]
    found = min([*enough, reached], key=lambda trial: trial.reduction)
    while True:  # where tokens have run out, moving one between blocks is coarse: trim the last reduction instead
        remove = list(found.remove)
        remove[max(block for block, count in enumerate(remove) if count)] -= 1
        trial = cost(remove)
        if trial.reduction < ratio:
            return found
        found = trial


def _check_counts(counts: list[int], depth: int, ordinary: int) -> None:
    if len(counts) != depth or not all(isinstance(count, int) and count >= 0 for count in counts):
        raise UserError(f"mtr.schedule must hold {depth} counts ≥ 0, one a block, got {counts}.")
    if sum(counts) >= ordinary:
        raise UserError(f"mtr.schedule removes {sum(counts)} of {ordinary} tokens: at most {ordinary - 1} can go.")
