"""What a report shows of its runs: points, what tells runs of the same policy apart, paired differences."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from mtr_lab.errors import UserError
from mtr_lab.report.dashboard.runs import Run
from mtr_lab.results.comparison import Sample, check_same_images, compare_all, correct
from mtr_lab.results.environment import hardware_name
from mtr_lab.results.predictions import name_of, point_name
from mtr_lab.results.schema import SPEEDS, Point
from mtr_lab.results.seeds import Place, mean_point
from mtr_lab.results.settings import flatten

_SPEED_SETTINGS = ("timing.batch_size", "trainer.cuda_graph", "trainer.precision", "ops.backend")
_NAMED_SETTINGS = 4  # in the name of a variant


def _setting(run: Run) -> tuple[str, ...]:
    """What two runs must share for their points to be compared."""
    return run.result["task"], run.result["backbone"], run.result["dataset"]


def points_of(runs: Sequence[Run], seeds: Sequence[Sequence[Place]]) -> Iterator[dict[str, Any]]:
    """The points to show, each as a run and an index in its result; ``places`` are all points that it stands for.

    A sweep evaluates the unreduced model in each run, with equal figures except the speed. It is shown once, as in the
    run with the median speed; runs with other timing settings count apart. A group of ``seeds``, whose points differ
    only in the seed, is shown as its ``mean``, at the place of its first point.
    """
    equal: dict[str, list[Place]] = defaultdict(list)
    grouped = {place for group in seeds for place in group}
    for r, run in enumerate(runs):
        for i, point in enumerate(run.result["points"]):
            if (r, i) in grouped:
                continue
            key: list[Any] = [r, i]
            if point["policy"] == "none":
                content = {name: value for name, value in point.items() if name not in SPEEDS}
                key = [_setting(run), hardware_name(run.result["environment"]), run.result.get("weights"), content]
                if any(name in point for name in SPEEDS):
                    settings = dict(flatten(run.result["config"]))
                    key.append([settings.get(name) for name in _SPEED_SETTINGS])
            equal[json.dumps(key, sort_keys=True)].append((r, i))
    for places in equal.values():
        by_speed = sorted(places, key=lambda place: runs[place[0]].result["points"][place[1]].get("img_per_s") or 0)
        r, i = by_speed[(len(places) - 1) // 2]
        yield {"run": r, "point": i, "places": places}
    results = [run.result for run in runs]
    for group in seeds:
        r, i = group[0]
        yield {"run": r, "point": i, "places": group, "mean": mean_point(results, group)}


def variants_of(runs: Sequence[Run], seeds: Sequence[Sequence[Place]]) -> list[str]:
    """What tells runs of the same policy apart: number of images and settings that differ, else the name, else ""."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for r, run in enumerate(runs):
        policies = frozenset(point["policy"] for point in run.result["points"]) - {"none"}
        groups[_setting(run), hardware_name(run.result["environment"]), policies].append(r)
    variants = [""] * len(runs)
    others = {place for group in seeds for place in group[1:]}  # shown as one point with the first of their group
    for members in groups.values():
        settings = {r: {"images": _images(runs[r]), **dict(flatten(runs[r].result["config"]))} for r in members}
        keys = dict.fromkeys(key for flat in settings.values() for key in flat)
        varied = [key for key in keys if len({flat.get(key) for flat in settings.values()}) > 1]
        for r in members:
            named = [f"{key}={settings[r].get(key)}" for key in varied[:_NAMED_SETTINGS]]
            variants[r] = ", ".join(named + ["…"] * (len(varied) > _NAMED_SETTINGS))
        alike: dict[tuple[str, str], list[int]] = defaultdict(list)
        for r in members:
            for i, point in enumerate(runs[r].result["points"]):
                if point["policy"] != "none" and (r, i) not in others:
                    alike[variants[r], name_of(point)].append(r)
        for r in {r for same in alike.values() if len(same) > 1 for r in same}:
            variants[r] = f"{variants[r]} ({runs[r].name})".lstrip()
    return variants


def _images(run: Run) -> str:
    """The number of images of a run, with those that could not be read."""
    point = run.result["points"][0]
    return str(point["images"] + len(point["skipped"]))


def differences_of(runs: Sequence[Run], seeds: Sequence[Sequence[Place]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Compare each point with its run's unreduced point, and with all points of other policies or runs at its ratio.

    A smaller model is compared with all points. P-values are corrected for the number of comparisons, those with
    unreduced points and the others apart.

    Points that differ only in the seed are compared as their mean, at the place of the first.

    Returns:
        The differences of all points that can be paired, and notes why others cannot.
    """
    sets: dict[tuple[str, ...], list[list[tuple[int, Sample]]]] = defaultdict(list)
    notes = []
    for r, run in enumerate(runs):
        if run.sample is None:
            continue
        alternatives = sets[_setting(run)]
        for members in alternatives:
            try:
                check_same_images(members[0][1].hashes, run.sample.hashes, f"{runs[members[0][0]].name} and {run.name}")
            except UserError as error:
                reason = str(error)
            else:
                members.append((r, run.sample))
                break
        else:
            if alternatives:
                notes.append(reason)
            alternatives.append([(r, run.sample)])
    differences = []
    grouped = {place for group in seeds for place in group}
    for members in (members for alternatives in sets.values() for members in alternatives):
        samples = dict(members)
        single = [[(r, i)] for r, sample in members for i in range(len(sample.points)) if (r, i) not in grouped]
        groups = [*single, *(group for group in seeds if all(r in samples for r, _ in group))]
        places = [group[0] for group in groups]
        points: list[Point] = [runs[r].result["points"][i] for r, i in places]
        pairs = [
            (a, b)
            for a, b in combinations(range(len(places)), 2)
            if points[b]["policy"] != "none" and (places[a] == (places[b][0], 0) or _comparable(points[a], points[b]))
        ]
        metrics = [_summed([samples[r].metrics[i] for r, i in group]) for group in groups]
        compared = compare_all(metrics, pairs, runs=[len(group) for group in groups])
        for to_unreduced in (True, False):  # two tables of the page
            correct([row for (a, _), row in zip(pairs, compared, strict=True) if (places[a][1] == 0) == to_unreduced])
        for (a, b), difference in zip(pairs, compared, strict=True):
            differences.append({"first": places[a], "second": places[b], **difference})
    return differences, notes


def _summed(metrics: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The metrics of each image, summed over runs."""
    return {name: np.sum([of_run[name] for of_run in metrics], axis=0) for name in metrics[0]}


def _comparable(first: Point, second: Point) -> bool:
    """Whether both have the same budget; a smaller model, which has none, is compared with every point."""
    if first["policy"] == "none" or first.get("model") == second.get("model", ""):
        return False
    if "model" in first or "model" in second:
        return True
    asked = [point_name("", point["ratio"], budget=point.get("budget")) for point in (first, second)]
    return asked[0] != "" and asked[0] == asked[1]
