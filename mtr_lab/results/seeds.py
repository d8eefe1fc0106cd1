"""Means over seeds: the points of runs that differ only in ``mtr.seed``, from which some policies draw."""

import json
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from mtr_lab.results.environment import hardware_name
from mtr_lab.results.schema import Result
from mtr_lab.results.settings import flatten

Place = tuple[int, int]
"""The index of a result, and the index of a point in it."""


def seed_groups(results: Sequence[Result]) -> list[list[Place]]:
    """Groups of two or more points that differ only in the seed, by rising seed; a group has each seed once."""
    groups: dict[str, list[Place]] = defaultdict(list)
    for r, result in enumerate(results):
        evaluated = [result["task"], result["backbone"], result["dataset"], hardware_name(result["environment"])]
        run = [*evaluated, result.get("weights"), dict(flatten(result["config"]))]
        for i, point in enumerate(result["points"]):
            if point["policy"] != "none":
                asked = point["budget"]["asked"] if "budget" in point else point["ratio"]
                picture = [point.get("resolution"), point["images"], point["skipped"]]
                same = [point["policy"], asked, point["tokens"], *picture]
                groups[json.dumps([*run, *same], sort_keys=True)].append((r, i))
    by_seed = [sorted(group, key=lambda place: seed_of(results[place[0]])) for group in groups.values()]
    return [group for group in by_seed if len({seed_of(results[r]) for r, _ in group}) == len(group) > 1]


def seed_of(result: Result) -> int:
    """The seed of a run; 0 if its configuration has none, as in older results."""
    settings = result["config"].get("mtr")
    return settings.get("seed", 0) if isinstance(settings, dict) else 0


def mean_point(results: Sequence[Result], group: Sequence[Place]) -> dict[str, Any]:
    """The mean of the points of a group of ``seed_groups``.

    Returns:
        A point with ``seeds``; each metric has its standard deviation over the seeds, ``KEY_sd``, in place of its
        interval over images. A figure that one of the points lacks is null.
    """
    points: list[dict[str, Any]] = [dict(results[r]["points"][i]) for r, i in group]
    mean = {key: _mean([point.get(key) for point in points]) for key in points[0] if not key.endswith("_ci")}
    for key in [key for key in mean if f"{key}_ci" in points[0]]:
        mean[f"{key}_sd"] = None if mean[key] is None else stdev(point[key] for point in points)
    return mean | {"seeds": [seed_of(results[r]) for r, _ in group]}


def _mean(values: list[Any]) -> Any:
    """The mean of numbers, or of dicts of numbers; equal values, of whatever type, stay as they are."""
    if all(value == values[0] for value in values):
        return values[0]
    if any(value is None for value in values):
        return None
    if isinstance(values[0], dict):
        return {name: _mean([value.get(name) for value in values]) for name in values[0]}
    return fmean(values)
