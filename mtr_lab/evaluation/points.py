"""Operating points: from the ``mtr`` group of the configuration, and into a result."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from mtr_lab.errors import UserError
from mtr_lab.measure.speed import Speed
from mtr_lab.reduction import MAX_DROP, SPEEDUP, Budget, Reduction
from mtr_lab.results.predictions import Predictions
from mtr_lab.results.schema import Point
from mtr_lab.tasks.evaluation import OperatingPoint
from mtr_lab.tasks.task import AnyTask

PROVISIONAL_RATIO = 0.02
"""Of points whose budget is not a ratio, until it is solved."""


def policy_settings(settings: DictConfig) -> dict[str, Any]:
    """The ``mtr`` group without the budgets, as ``Reduction`` expects it."""
    budgets = ("ratio", SPEEDUP, MAX_DROP)
    return {str(key): value for key, value in OmegaConf.to_container(settings).items() if key not in budgets}  # type: ignore[union-attr]


def asked_budgets(settings: DictConfig) -> tuple[str, list[float]] | None:
    """The key of the budget that the ``mtr`` group asks for instead of a ratio, and its values; ``None`` for none."""
    for key in (SPEEDUP, MAX_DROP):
        asked = settings.get(key)  # training has ratios alone
        if asked is not None:
            return key, list(dict.fromkeys(asked)) if isinstance(asked, ListConfig) else [asked]
    return None


def operating_points(reduction: Reduction, settings: DictConfig) -> list[OperatingPoint]:
    """The unreduced model and the policy at every ratio of the ``mtr`` group (or at the counts it gives).

    With another budget the schedules are provisional, those of ``PROVISIONAL_RATIO``: ``mtr_lab.evaluation.budgets``
    solves them on a model with weights.

    Raises:
        UserError: a schedule cannot be solved.
    """
    if budgets := asked_budgets(settings):
        key, asked = budgets
        unreduced, reduced = points_at(reduction, settings.policy, [PROVISIONAL_RATIO])
        provisional = [replace(reduced, ratio=None, budget=Budget(key, value, math.nan)) for value in asked]
        return [unreduced, *provisional]
    ratio = settings.ratio
    return points_at(reduction, settings.policy, list(ratio) if isinstance(ratio, ListConfig) else [ratio])


def points_at(reduction: Reduction, policy: str, ratios: Iterable[float | None]) -> list[OperatingPoint]:
    """The unreduced model and the policy at every ratio, solved by ``reduction``.

    Args:
        policy: its name in the results.
        ratios: shares of the FLOPs to remove, in [0, 1); ``None`` for the configured token counts, at every size of the
            picture if ``mtr.resolution`` is a list.

    Raises:
        UserError: a ratio is not a share, or a schedule cannot be solved.
    """
    ratios = list(ratios)
    for ratio in ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float | None):
            raise UserError(f"mtr.ratio must be a share of the FLOPs in [0, 1), or a list of them, got {ratio!r}.")
    points = [OperatingPoint("none", 0.0, reduction.solve(0.0))]
    resolution = reduction.config["resolution"]
    for ratio in dict.fromkeys(ratios):
        several = ratio is None and isinstance(resolution, list)
        for size in dict.fromkeys(resolution) if several else [None]:
            point = OperatingPoint(policy, ratio, reduction.solve(ratio, size))
            if ratio != 0 and (point.schedule.acts or not several):  # of the sizes, the full one is the unreduced model
                points.append(point)
    return points


def strongest(points: list[OperatingPoint]) -> OperatingPoint:
    """The point that removes the most.

    Raises:
        UserError: no point removes tokens.
    """
    point = max(points, key=lambda point: point.schedule.reduction)
    if not point.schedule.acts:
        raise UserError("no token is removed, so there is nothing to draw: give an mtr.ratio above 0.")
    return point


def describe_points(
    task: AnyTask,
    model: nn.Module,
    points: Sequence[OperatingPoint],
    predictions: Predictions,
    skipped: list[str],
    speeds: Mapping[str, Speed],
    with_memory: bool = True,
) -> list[Point]:
    """The points of a result.

    Args:
        model: the task's.
        predictions: at all points.
        skipped: names of the images that could not be read.
        speeds: by the name of the point; without one, a point has no measured keys.
        with_memory: whether a speed's ``peak_mib`` holds. CUDA graphs allocate memory when they are captured, not
            during the measured call.
    """
    described: list[Any] = [
        {
            **_costs(task, model, point),
            "skipped": skipped,
            **task.score(predictions, i),
            **_measured(speeds.get(point.name), speeds.get(points[0].name), with_memory),
        }
        for i, point in enumerate(points)
    ]
    for point, figures in zip(points, described, strict=True):
        if point.budget is not None:
            figures["budget"] = {**asdict(point.budget), "measured": _kept(point.budget, figures)}
    return described


def _kept(budget: Budget, figures: Mapping[str, Any]) -> float | None:
    """What of a budget was measured: the speed-up in the timing pass, or the images that change their class."""
    if budget.key == MAX_DROP:
        return None if figures.get("agreement") is None else 1 - figures["agreement"]
    return figures.get("speedup", budget.measured)


def _measured(speed: Speed | None, unreduced: Speed | None, with_memory: bool) -> dict[str, Any]:
    if speed is None or unreduced is None:
        return {}
    speedup, interval = speed.over(unreduced)
    memory = {"peak_mib": speed.peak_mib} if with_memory else {}
    relative = {"speedup": speedup, "speedup_ci": list(interval)}
    return {"img_per_s": speed.img_per_s, **relative, "latency_ms": speed.latency_ms, **memory}


def _costs(task: AnyTask, model: nn.Module, point: OperatingPoint) -> dict[str, Any]:
    """What follows from a point's schedule: the asked and the achieved reduction, FLOPs, tokens."""
    schedule, head = point.schedule, task.head_flops(model)
    return {
        "policy": point.policy,
        "ratio": point.ratio,
        "reduction": schedule.reduction,
        "flops_literature": schedule.flops_literature,
        "flops_true": schedule.flops + schedule.flops_overhead,
        "flops_overhead": schedule.flops_overhead,
        **({} if head is None else {"flops_head": head}),
        "tokens": list(schedule.tokens),
        **({} if schedule.resolution is None else {"resolution": list(schedule.resolution)}),
    }
