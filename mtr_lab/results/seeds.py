"""Runs that differ in ``mtr.seed`` alone, from which some policies draw: mean and spread of their points."""

import json
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from mtr_lab.results.environment import hardware_name
from mtr_lab.results.schema import Result
from mtr_lab.results.settings import flatten

Place = tuple[int, int]
"""A result's place in a sequence, and a point's place in it."""


def seed_groups(results: Sequence[Result]) -> list[list[Place]]:
    """The points that are the same but for the seed: groups of several, by rising seed, every seed once."""
    groups: dict[str, list[Place]] = defaultdict(list)
    for r, result in enumerate(results):
        evaluated = [result["task"], result["backbone"], result["dataset"], hardware_name(result["environment"])]
        run = [*evaluated, result.get("weights"), dict(flatten(result["config"]))]
        for i, point in enumerate(result["points"]):
            if point["policy"] != "none":
                same = [point["policy"], point["ratio"], point["tokens"], point["images"], point["skipped"]]
                groups[json.dumps([*run, *same], sort_keys=True)].append((r, i))
    found = [sorted(group, key=lambda place: seed_of(results[place[0]])) for group in groups.values()]
    return [group for group in found if len({seed_of(results[r]) for r, _ in group}) == len(group) > 1]


def seed_of(result: Result) -> int:
    """The seed of a run: 0 where the configuration has none, as before it could be set."""
    settings = result["config"].get("mtr")
    return settings.get("seed", 0) if isinstance(settings, dict) else 0


def mean_point(results: Sequence[Result], group: Sequence[Place]) -> dict[str, Any]:
    """The mean of the points of a group of ``seed_groups``.

    Returns:
        a point with ``seeds``, and for each metric its standard deviation over the seeds, ``<metric>_sd``, in place of
        its interval over the images. A figure that one of the points lacks is null.
    """
    points: list[dict[str, Any]] = [dict(results[r]["points"][i]) for r, i in group]
    mean = {key: _mean([point.get(key) for point in points]) for key in points[0] if not key.endswith("_ci")}
    for key in [key for key in mean if f"{key}_ci" in points[0]]:
        mean[f"{key}_sd"] = None if mean[key] is None else stdev(point[key] for point in points)
    return mean | {"seeds": [seed_of(results[r]) for r, _ in group]}


def _mean(values: list[Any]) -> Any:
    """Of numbers, or of numbers by name; what is the same in all stays as it is."""
    if all(value == values[0] for value in values):
        return values[0]
    if any(value is None for value in values):
        return None
    if isinstance(values[0], dict):
        return {name: _mean([value.get(name) for value in values]) for name in values[0]}
    return fmean(values)
