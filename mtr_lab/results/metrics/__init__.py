"""The metrics of all tasks, one file each.

A new metric is a new file in this folder that defines ``METRIC``. Results, tables, charts, loggers, comparisons and the
``objective`` of a sweep read this table. ``mtr_lab.results.schema.Point`` lists the keys for type checkers.
"""

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from mtr_lab.results.metrics.metric import Metric
from mtr_lab.results.predictions import Predictions


@cache
def all_metrics() -> tuple[Metric, ...]:
    """The metrics of all tasks, in the order of tables and charts."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return tuple(sorted((m.METRIC for m in modules if hasattr(m, "METRIC")), key=lambda metric: metric.order))


def task_metrics(task: str) -> list[Metric]:
    """The metrics of one task."""
    return [metric for metric in all_metrics() if task in (metric.task, *metric.also)]


def shown_metrics(points: Iterable[Mapping[str, Any]]) -> list[Metric]:
    """The metrics that at least one of these points of results has."""
    keys = {key for point in points for key in point}
    return [metric for metric in all_metrics() if metric.key in keys]


def accuracy(points: Iterable[Mapping[str, Any]]) -> Metric | None:
    """The metric by which these points are first compared: accuracy itself, mean IoU, average precision."""
    return next((metric for metric in shown_metrics(points) if not metric.relative), None)


def score(predictions: Predictions, point: int) -> dict[str, Any]:
    """Score one point.

    Args:
        predictions: for at least one image; point 0 is the unreduced model.
        point: which to score.

    Returns:
        The number of ``images``, and each metric of the task with its interval, as in ``result.json``.
    """
    scores: dict[str, Any] = {"images": len(predictions.ids)}
    for metric in task_metrics(predictions.task):
        scores |= metric.score(predictions, point)
    return scores
