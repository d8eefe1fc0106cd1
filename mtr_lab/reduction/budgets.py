"""Budgets besides ``ratio``: a speed-up on this device, and a drop that is not exceeded with 95 % confidence.

Both are searches over the ratio, so that every policy and every schedule can take them.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtr_lab.errors import UserError
from mtr_lab.measure.statistics import lower_bound, trials_needed, upper_bound
from mtr_lab.reduction.cost_table import CostTable
from mtr_lab.reduction.schedule import OutOfReach, Schedule

if TYPE_CHECKING:
    from mtr_lab.reduction.handle import Reduction  # imports this module

SPEEDUP, MAX_DROP = "speedup", "max_drop"
LEVEL = 0.95
"""The confidence with which a drop is not exceeded."""
RATIO_STEPS = 1000
"""A speed-up is sought at multiples of 1 / ``RATIO_STEPS`` of the FLOPs."""
DROP_STEP = 0.02
"""A drop is tested at multiples of this share of the FLOPs."""
BATCH = 50  # images at once, where a drop is measured
SEARCH_IMAGES = 128  # for ``schedule=auto`` and the like


@dataclass(frozen=True)
class Budget:
    """What a reduction was asked for instead of a ratio, and what it keeps."""

    key: str
    """``speedup`` or ``max_drop``."""
    asked: float
    """Times as fast as the unreduced model; or the largest drop, a fraction of the images."""
    promised: float
    """The speed-up that the cost table predicts, at least the asked one; or the upper bound of the drop, at most the
    asked one."""
    measured: float | None = None
    """The speed-up that was measured afterwards; ``None`` if it was not."""


def check_budget(asked: Mapping[str, object], name: str = "mtr.") -> tuple[str, object] | None:
    """The one budget that was asked for, and its value; ``None`` without one.

    Args:
        asked: by ``ratio``, ``speedup`` and ``max_drop``; ``None`` for a budget that was not.
        name: what messages write in front of a key.

    Raises:
        UserError: several budgets, or a value out of its range.
    """
    given = {key: value for key, value in asked.items() if value is not None}
    if len(given) > 1:
        pairs = " and ".join(f"{name}{key}={value}" for key, value in given.items())
        raise UserError(f"{pairs}: give one of {', '.join(f'{name}{key}' for key in asked)}.")
    for key, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key == SPEEDUP and not (number and 1 < value < math.inf):  # type: ignore[operator]
            raise UserError(f"{name}speedup={value}: expected a number above 1, times as fast as the unreduced model.")
        if key == MAX_DROP and not (number and 0 < value < 1):  # type: ignore[operator]
            raise UserError(f"{name}max_drop={value}: expected a fraction of the images in (0, 1), 0.01 for 1 %.")
        return key, value
    return None


def solve_speedup(reduction: "Reduction", asked: float, table: CostTable) -> tuple[Schedule, Budget]:
    """The schedule of the smallest ratio that is predicted to be ``asked`` times as fast as the unreduced model.

    The predicted speed-up rises with the ratio but for steps that take longer than they save, so the ratio is found by
    bisection.

    Raises:
        UserError: no ratio is fast enough; names the maximum.
    """
    solved: dict[int, Schedule] = {}

    def speedup(step: int) -> float:
        try:
            solved[step] = reduction.solve(step / RATIO_STEPS)
        except OutOfReach:
            return math.inf
        return table.speedup(solved[step])

    step = bisect_left(range(1, RATIO_STEPS), asked, key=speedup) + 1
    if step in solved and (promised := table.speedup(solved[step])) >= asked:
        return solved[step], Budget(SPEEDUP, asked, promised)
    if not solved:
        reduction.solve(1 / RATIO_STEPS)  # says why not
    fastest = max(solved.values(), key=table.speedup)
    most = math.floor(100 * max(1.0, table.speedup(fastest))) / 100
    raise UserError(
        f"mtr.speedup={asked} is out of reach: at most {most} at this batch size on this device, where "
        f"{100 * fastest.reduction:.0f} % of the FLOPs are removed. Lower it, or take larger batches, or fewer blocks "
        "that reduce (mtr.interval)."
    )


def images_needed(max_drop: float, with_labels: bool = False) -> int:
    """The fewest images that can show that a drop is at most ``max_drop``: where no class changes."""
    return trials_needed(max_drop, _level(with_labels))


def check_images(count: int, max_drop: float, with_labels: bool = False, name: str = "mtr.max_drop") -> None:
    """Raise a ``UserError`` if no drop can be proven on this number of images."""
    if count < (needed := images_needed(max_drop, with_labels)):
        raise UserError(
            f"{name}={max_drop} cannot be shown with {100 * LEVEL:.0f} % confidence on {count} calibration images, "
            f"even if none of them changes: give at least {needed}, several times as many to remove much, or a larger "
            "drop."
        )


def drop_bound(changed: int, gained: int | None, total: int) -> float:
    """The upper bound of a drop, at ``LEVEL``.

    Args:
        changed: images whose class changes; with labels, those whose right class becomes a wrong one.
        gained: with labels, images whose wrong class becomes the right one; ``None`` without labels.
        total: the number of images.

    Returns:
        Without labels the Clopper–Pearson bound of the share that changes. With labels the loss of top-1 is the share
        lost minus the share gained: the bound of the one minus the lower bound of the other, each with half the error.
    """
    if gained is None:
        return upper_bound(changed, total, LEVEL)
    level = _level(with_labels=True)
    return upper_bound(changed, total, level) - lower_bound(gained, total, level)


def _level(with_labels: bool) -> float:
    """Of each bound that a drop is computed from, two with labels and one without; their errors add up."""
    return (1 + LEVEL) / 2 if with_labels else LEVEL


@torch.no_grad()
def solve_max_drop(
    reduction: "Reduction",
    asked: float,
    images: Tensor,
    labels: Tensor | None = None,
    prepare: Callable[[Tensor], Tensor] = lambda images: images,
) -> tuple[Schedule, Budget]:
    """The schedule of the largest ratio whose drop is at most ``asked`` with 95 % confidence.

    What is bounded: the share of images like the given ones whose class differs from the unreduced model's; with
    labels, the loss of top-1. The images stand for others only as far as both are drawn alike: a model is surer of the
    images it was trained on.

    Ratios are tested from the smallest on, in steps of ``DROP_STEP``, until one fails. In this fixed sequence each test
    may have the whole error of 5 %: a ratio whose drop is too large is returned only if the first such ratio passes
    its one test. A bisection would need a correction for its looks, and more images.

    Args:
        reduction: the handle of the patched classifier, in evaluation mode.
        asked: a fraction.
        images: (N, channels, H, W), on which nothing else was chosen.
        labels: (N,) classes.
        prepare: a batch of images -> the batch as the model expects it.

    Raises:
        UserError: too few images for any proof, or not one ratio passes.

    Source: fixed-sequence testing, Maurer, Hothorn and Lehmacher 1995; for predictions, Angelopoulos et al., "Learn
    then Test", arXiv 2110.01052.
    """
    check_images(len(images), asked, labels is not None)

    model: Any = reduction.model
    before = reduction.schedule

    def classes(schedule: Schedule) -> Tensor:
        reduction.use(schedule)
        return torch.cat([model(prepare(part)).argmax(-1).to(images.device) for part in images.split(BATCH)])

    accepted: tuple[Schedule, Budget] | None = None
    tested: Schedule | None = None
    try:
        unreduced = classes(reduction.solve(0.0))
        for step in range(1, math.ceil(1 / DROP_STEP)):
            try:
                schedule = reduction.solve(step * DROP_STEP)
            except OutOfReach:
                if tested is None:
                    raise
                break
            if schedule == tested:  # a policy may remove in larger steps
                continue
            tested = schedule
            changed, gained = _changes(unreduced, classes(schedule), labels)
            bound = drop_bound(changed, gained, len(images))
            if bound > asked:
                break
            accepted = schedule, Budget(MAX_DROP, asked, bound)
    finally:
        reduction.use(before)
    if accepted is None:
        assert tested is not None
        what = "change their class" if labels is None else f"lose the right class and {gained} gain it"
        raise UserError(
            f"mtr.max_drop={asked} is out of reach: where {100 * tested.reduction:.1f} % of the FLOPs are removed, "
            f"{changed} of {len(images)} calibration images {what}, so that with {100 * LEVEL:.0f} % confidence the "
            f"drop is at most {math.ceil(1e4 * bound) / 1e4}. Allow that much, give more images, or choose another "
            "policy."
        )
    return accepted


def _changes(unreduced: Tensor, reduced: Tensor, labels: Tensor | None) -> tuple[int, int | None]:
    """The numbers of images that change for the worse, or at all without labels, and for the better."""
    if labels is None:
        return int((unreduced != reduced).sum()), None
    right, stays_right = unreduced == labels, reduced == labels
    return int((right & ~stays_right).sum()), int((~right & stays_right).sum())


def is_for_search(count: int, device: torch.device | None = None) -> Tensor:
    """Which of the calibration images a schedule is measured on: ``SEARCH_IMAGES``, at most half of them.

    A drop has to be tested on images on which the schedule was not chosen. The images are at even distances, since a
    dataset is ordered by class.

    Returns:
        (count,) bool.
    """
    search = min(SEARCH_IMAGES, count // 2)
    chosen = torch.zeros(count, dtype=torch.bool, device=device)
    chosen[torch.arange(search, device=device) * count // max(search, 1)] = True
    return chosen
