"""The time of a reduced model, predicted from times of its blocks that were measured on the device at hand."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mtr_lab.backbones import Backbone, blocks_of, first_state, run
from mtr_lab.backbones.interface import run_block
from mtr_lab.measure.conditions import conditions
from mtr_lab.measure.speed import call_ms, rounds
from mtr_lab.reduction.blocks import BlockInfo, block_infos, can_decide
from mtr_lab.reduction.partial_blocks import SCANS
from mtr_lab.reduction.plan import apply, make_plan
from mtr_lab.reduction.schedule import OutOfReach, Schedule, make_schedule
from mtr_lab.tokens import TokenState
from mtr_lab.tokens.pooling import ordinary_tokens

if TYPE_CHECKING:
    from mtr_lab.reduction.handle import Reduction  # imports this module

SHARES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.05)
"""Of a stage's tokens: the sequences on which its blocks are timed."""
REMOVED_SHARE = 0.1
"""Of the entering tokens: the number that a timed step removes."""
ANCHOR = 0.4
"""The ratio at which the whole reduced model is timed, too, where it is in reach."""
CALLS = 4  # of a block in one measurement: a device that computes asynchronously gets a stream of them, as in a model
WARM_UP_CALLS = 2
MIN_ROUNDS = 5
SECONDS = 5.0  # no round starts later

Call = Callable[[], object]
Clock = Callable[[Call, torch.device], float]
"""A call and its device -> the time of the call, ms."""


@dataclass(frozen=True)
class BlockTimes:
    """Times of one kind of block at several numbers of entering tokens of a sequence; ms a batch."""

    tokens: tuple[int, ...]
    """Rising."""
    block: tuple[float, ...]
    """Of a block that removes nothing."""
    step: tuple[float, ...]
    """What removing tokens adds: evidence, decision, and the plan applied to both streams."""
    path: float = 0.0
    """The share of ``block`` that each skipped path of the scan saves."""

    def at(self, tokens: int, reduces: bool, skipped: int = 0) -> float:
        """The time for this number of tokens: linear in between, and that of the fewest tokens below.

        Args:
            skipped: the number of paths that the scan skips.
        """
        block, step = (float(np.interp(tokens, self.tokens, rising(values))) for values in (self.block, self.step))
        return block * (1 - skipped * self.path) + (step if reduces else 0.0)


@dataclass(frozen=True)
class CostTable:
    """Times of a model under a policy, by which the time of any schedule is predicted; ms a batch."""

    kinds: tuple[int, ...]
    """For each block its place in ``blocks``."""
    blocks: tuple[BlockTimes, ...]
    unreduced: float
    """Of the whole unreduced model."""
    rest: float
    """The part of ``unreduced`` that is spent outside the blocks."""
    scale: float = 1.0
    """What times of blocks are multiplied by, as in a whole model they find other data in the caches."""

    def ms(self, schedule: Schedule) -> float:
        """The predicted time under a schedule."""
        if not schedule.acts:
            return self.unreduced
        skipped = [len(paths) for paths in schedule.skipped] or [0] * len(self.kinds)
        counts = zip(self.kinds, schedule.tokens, schedule.remove, skipped, strict=True)
        in_blocks = sum(self.blocks[kind].at(tokens, removed > 0, paths) for kind, tokens, removed, paths in counts)
        return self.rest + self.scale * in_blocks

    def speedup(self, schedule: Schedule) -> float:
        """The unreduced time divided by the predicted time under a schedule."""
        return self.unreduced / self.ms(schedule)


def rising(values: Sequence[float]) -> np.ndarray:
    """The rising sequence nearest to the values in the least squares: more tokens never take less time.

    Source: the pool-adjacent-violators algorithm, Ayer et al., Annals of Mathematical Statistics 26, 1955.
    """
    pools: list[tuple[float, int]] = []  # mean and length
    for value in values:
        mean, length = float(value), 1
        while pools and pools[-1][0] > mean:
            before, count = pools.pop()
            mean, length = (before * count + mean * length) / (count + length), count + length
        pools.append((mean, length))
    return np.repeat([mean for mean, _ in pools], [length for _, length in pools])


def cost_table(
    reduction: "Reduction", images: Tensor, whole: Call, module: nn.Module, clock: Clock = call_ms
) -> CostTable:
    """The table of a patched model, read from the user's cache, or measured and stored there.

    It is measured anew for another device, number of threads, precision, batch, model, policy or version of the code:
    ``$XDG_CACHE_HOME/mtr_lab/cost_tables``, by default in ``~/.cache``. Delete the folder if a table was measured while
    the machine was busy.

    Args:
        reduction: the handle of the patched backbone.
        images: (B, channels, H, W), the batch to be fast on, on the model's device.
        whole: runs the whole unreduced model on the images.
        module: the whole model; it may contain more than the backbone, such as the head of a dense task.
        clock: measures a call.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtr_lab" / "cost_tables"
    described = json.dumps(_described(reduction, images, module), default=str)
    file = cache / f"{hashlib.blake2b(described.encode(), digest_size=16).hexdigest()}.json"
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))["table"]
        return CostTable(
            kinds=tuple(stored["kinds"]),
            blocks=tuple(
                BlockTimes(tuple(row["tokens"]), tuple(row["block"]), tuple(row["step"]), row["path"])
                for row in stored["blocks"]
            ),
            unreduced=stored["unreduced"],
            rest=stored["rest"],
            scale=stored["scale"],
        )
    except (OSError, ValueError, KeyError, TypeError):  # it is measured, or an interrupted write is repeated
        table = measure_cost_table(reduction, images, whole, clock)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partly = file.with_suffix(f".{os.getpid()}")
        partly.write_text(json.dumps({"of": json.loads(described), "table": asdict(table)}, indent=1))
        partly.replace(file)
    except OSError:  # a cache that cannot be written costs a measurement, no more
        pass
    return table


def _described(reduction: "Reduction", images: Tensor, module: nn.Module) -> dict[str, Any]:
    """Everything that the times depend on."""
    return {
        **conditions(images.device),
        "images": [tuple(images.shape), images.dtype],
        "model": type(module).__name__,
        "parameters": [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in module.named_parameters()],
        "policy": asdict(reduction.policy),
    }


@torch.no_grad()
def measure_cost_table(reduction: "Reduction", images: Tensor, whole: Call, clock: Clock = call_ms) -> CostTable:
    """Time the kinds of blocks at ``SHARES`` of their tokens, with and without a step, and the whole model.

    Blocks of one stage with equal classes, parameter shapes and scan paths are one kind, of which the first is timed.
    Those that compute the class token alone are another.
    All measurements take turns for ``MIN_ROUNDS`` rounds or more, so that a machine that is slow for a while slows all
    alike; the table has the medians.

    Args:
        reduction, images, whole, clock: see ``cost_table``.
    """
    model, before, unreduced = reduction.model, reduction.schedule, reduction.solve(0.0)
    size = images.shape[-2], images.shape[-1]
    infos = block_infos(model, reduction.policy, size)
    names = [_kind(info, block) for info, block in zip(infos, blocks_of(model), strict=True)]
    firsts = [names.index(name) for name in dict.fromkeys(names)]
    kinds = tuple(firsts.index(names.index(name)) for name in names)
    anchor = None
    with contextlib.suppress(OutOfReach):
        anchor = make_schedule(model, reduction.policy, ratio=ANCHOR, img_size=size)
    calls: dict[Any, Call] = {"unreduced": partial(_once, reduction, unreduced, whole)}
    if anchor is not None:
        calls["anchor"] = partial(_once, reduction, anchor, whole)
    try:
        reduction.use(unreduced)
        for first, state in _states(model, firsts, images):
            alike = [number for number, name in enumerate(names) if name == names[first]]
            calls |= _block_calls(reduction, infos, alike[:2], state)
        times = timed_in_turn(calls, images.device, clock)
    finally:
        reduction.use(before)

    total = times["unreduced"]
    in_blocks = sum(times["unreduced", firsts[kind]] / CALLS for kind in kinds)
    rest = max(0.0, float(np.median(total - in_blocks)))
    table = tuple(_block_times(times, first) for first in firsts)
    costs = CostTable(kinds, table, float(np.median(total)), rest)
    if anchor is None:
        return costs
    anchored = costs.unreduced * float(np.median(times["anchor"] / total))
    return replace(costs, scale=max(anchored - rest, 0.0) / (costs.ms(anchor) - rest))


def _block_calls(
    reduction: "Reduction", infos: Sequence[BlockInfo], alike: Sequence[int], state: TokenState
) -> dict[Any, Call]:
    """What to time of a kind: ("unreduced", block), ("block", block, tokens) and ("step", block, tokens, after).

    A step is timed with a second block after it, whose norm applies the plan; ``after`` is the number of tokens there,
    0 without a second block.

    Args:
        alike: one block of this kind, or two.
        state: before the first of them, unreduced.
    """
    model, policy, unreduced = reduction.model, reduction.policy, reduction.schedule
    first, one, *two = alike[0], *(blocks_of(model)[number] for number in alike)
    info, length, special = infos[first], state.index.shape[1], state.special.shape[1]

    def removing(count: int, block: int) -> Schedule:
        """A schedule that removes tokens at one block; its costs are not those of these counts."""
        counts = [count * (number == block) for number in range(len(infos))]
        return replace(unreduced, remove=tuple(counts), at_other_places=policy.acts_at_other_places)

    elsewhere = [b for b, info in enumerate(infos) if b not in alike and can_decide(info, policy)]
    active = removing(1, elsewhere[0]) if elsewhere else unreduced  # the policy acts, at other blocks
    calls: dict[Any, Call] = {("unreduced", first): partial(_repeat, reduction, unreduced, [one], state)}
    timed = SHARES[:1] if policy.keeps_grid or info.is_sampled else SHARES  # a part of a grid is not a grid
    lengths = sorted({min(max(round(share * length), special + 1), length) for share in timed})
    for place, tokens in enumerate(lengths):
        shorter = _shortened(state, tokens)
        calls["block", first, tokens] = partial(_repeat, reduction, active, [one], shorter)
        shares = (REMOVED_SHARE, 2 * REMOVED_SHARE, 4 * REMOVED_SHARE) if can_decide(info, policy) else ()
        counts = (policy.possible(max(1, round(share * tokens)), tokens, info.layout) for share in shares)
        count = next(filter(None, counts), 0)  # a policy may remove whole rows alone
        if count and (
            place or len(lengths) == 1
        ):  # behind a step on the shortest sequence, one would have to extrapolate
            step = removing(count, first)
            after = policy.remaining(tokens, count) if two else 0
            calls["step", first, tokens, after] = partial(_repeat, reduction, step, [one, *two], shorter)
    if SCANS[policy.paths] is not None and (others := [path.name for path in one.mixer.paths[1:]]):
        skips = tuple(tuple(others) if number == first else () for number in range(len(infos)))
        single = replace(active, skipped=skips)
        calls["single", first, len(others)] = partial(_repeat, reduction, single, [one], state)
    return calls


def _block_times(times: Mapping[Any, np.ndarray], first: int) -> BlockTimes:
    """The medians over rounds; a step takes what it adds, in its round, to the blocks that it was timed with."""
    of_block = {key[2]: ms / CALLS for key, ms in times.items() if key[:2] == ("block", first)}
    lengths, of_round = list(of_block), np.stack(list(of_block.values()), axis=1)  # (rounds, lengths)
    if len(lengths) == 1:  # times in proportion to the tokens
        lengths, of_round = [0, *lengths], np.pad(of_round, ((0, 0), (1, 0)))
    steps = {}
    for key, ms in times.items():
        if key[:2] == ("step", first):
            _, _, tokens, after = key
            second = np.array([np.interp(after, lengths, row) for row in of_round]) if after else 0.0
            steps[tokens] = max(0.0, float(np.median(ms / CALLS - of_block[tokens] - second)))
    known = list(steps) or [0]
    step = np.interp(lengths, known, [steps.get(tokens, 0.0) for tokens in known])
    block = np.median(of_round, axis=0)
    singles = [
        float(np.median(1 - ms / CALLS / of_round[:, -1])) / key[2]
        for key, ms in times.items()
        if key[:2] == ("single", first)
    ]
    return BlockTimes(tuple(lengths), tuple(map(float, block)), tuple(map(float, step)), max([0.0, *singles]))


def timed_in_turn(calls: Mapping[Any, Call], device: torch.device, clock: Clock = call_ms) -> dict[Any, np.ndarray]:
    """The times of calls in ms, (rounds,) each, measured in rounds in which all take turns, after a warm-up."""
    for call in calls.values():
        for _ in range(WARM_UP_CALLS):
            call()
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for order in rounds(list(calls), MIN_ROUNDS, SECONDS):
        for name in order:
            times[name].append(clock(calls[name], device))
    return {name: np.array(measured) for name, measured in times.items()}


@torch.no_grad()
def measured_speedup(
    reduction: "Reduction", schedule: Schedule, whole: Call, device: torch.device, clock: Clock = call_ms
) -> float:
    """The time of ``whole`` unreduced, divided by its time under a schedule, both measured in turn."""
    before = reduction.schedule
    schedules = {"unreduced": reduction.solve(0.0), "reduced": schedule}
    try:
        times = timed_in_turn({k: partial(_once, reduction, s, whole) for k, s in schedules.items()}, device, clock)
    finally:
        reduction.use(before)
    return float(np.median(times["unreduced"] / times["reduced"]))


def _repeat(reduction: "Reduction", schedule: Schedule, blocks: Sequence[Any], state: TokenState) -> None:
    """Run blocks one after another, ``CALLS`` times; a plan that is still pending at the end is applied."""
    reduction.use(schedule)
    for _ in range(CALLS):
        after = state
        for block in blocks:
            after = run_block(reduction.model, block, after)
        after.applied()


def _once(reduction: "Reduction", schedule: Schedule, call: Call) -> None:
    reduction.use(schedule)
    call()


def _kind(info: BlockInfo, block: Any) -> tuple[Any, ...]:
    shapes = [(name, tuple(tensor.shape)) for name, tensor in block.named_parameters()]
    return info.stage, info.is_alone, type(block), type(block.mixer), block.mixer.paths, tuple(shapes)


def _states(model: Backbone, numbers: Sequence[int], images: Tensor) -> list[tuple[int, TokenState]]:
    """The states before the blocks of these numbers in the unreduced model."""
    state = first_state(model, images, special_alone=getattr(model, "reads_special_alone", False))
    states = enumerate(run(model, state))
    return [(number, before) for number, (before, _) in states if number in numbers]


def _shortened(state: TokenState, tokens: int) -> TokenState:
    """The state with this number of tokens: ordinary ones at even distances are dropped."""
    length = state.index.shape[1]
    if tokens == length:
        return state
    ordinary = ordinary_tokens(state.special, length)
    dropped = torch.linspace(0, ordinary.shape[1] - 1, length - tokens, device=ordinary.device).round().long()
    source = ordinary[:, dropped]
    key = torch.arange(length, device=source.device, dtype=torch.float32).expand(len(source), length)
    return apply(make_plan(source, torch.full_like(source, -1), key, torch.ones_like(key)), state)
