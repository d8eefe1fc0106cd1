"""What a report shows of its runs: points, what tells runs of the same policy apart, paired differences."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mtr_lab.errors import UserError
from mtr_lab.report.baselines import BASELINES
from mtr_lab.report.dashboard.presets import usual_settings
from mtr_lab.report.dashboard.runs import Run
from mtr_lab.results.comparison import Sample, check_same_images, compare_all, correct
from mtr_lab.results.environment import hardware_name
from mtr_lab.results.metrics.metric import Drawn
from mtr_lab.results.predictions import name_of, point_name
from mtr_lab.results.resampling import RESAMPLES
from mtr_lab.results.schema import SPEEDS, Point
from mtr_lab.results.seeds import Place, mean_point
from mtr_lab.results.settings import flatten

_SPEED_SETTINGS = (("timing", "batch_size"), ("trainer", "cuda_graph"), ("trainer", "precision"), ("ops", "backend"))
PAIRS = 3000
"""More comparisons than that are not read by anybody, and take long."""
FEW_RESAMPLES = 2000
_NAMED_SETTINGS = 4  # in the name of a variant


def _setting(run: Run) -> tuple[str, ...]:
    """What two runs must share for their points to be compared."""
    return run.result["task"], run.result["backbone"], run.result["dataset"]


def points_of(runs: Sequence[Run], seeds: Sequence[Sequence[Place]]) -> Iterator[dict[str, Any]]:
    """The points to show, each as a run and an index in its result; ``places`` are all points that it stands for.

    Points that differ in nothing but their measured speed, such as the unreduced model of each run of a sweep, are
    shown once, as in the run with the median speed; the unreduced model is shown once for each batch size, precision
    and implementation that it was timed with, and an untimed one with the first of these. A group of ``seeds``, whose
    points differ only in the seed, is shown as its ``mean``, at the place of its first point.
    """
    equal: dict[tuple[str, ...], list[Place]] = defaultdict(list)
    grouped = {place for group in seeds for place in group}
    for r, run in enumerate(runs):
        settings = dict(flatten(run.result["config"]))
        for i, point in enumerate(run.result["points"]):
            if (r, i) in grouped:
                continue
            key: list[Any] = [
                _setting(run),
                hardware_name(run.result["environment"]),
                run.result.get("weights"),
                _content(point),
            ]
            if point["policy"] != "none":
                key.append(settings)
            elif any(name in point for name in SPEEDS):
                config: dict[str, Any] = run.result["config"]
                key.append([(config.get(group) or {}).get(name) for group, name in _SPEED_SETTINGS])
            equal[tuple(json.dumps(part, sort_keys=True) for part in key)].append((r, i))
    for places in _with_untimed(equal):
        speeds = {place: runs[place[0]].result["points"][place[1]].get("img_per_s") or 0 for place in places}
        by_speed = sorted((place for place in places if speeds[place]), key=lambda place: speeds[place]) or places
        r, i = by_speed[(len(by_speed) - 1) // 2]
        yield {"run": r, "point": i, "places": places}
    results = [run.result for run in runs]
    for group in seeds:
        r, i = group[0]
        yield {"run": r, "point": i, "places": group, "mean": mean_point(results, group)}


def _with_untimed(equal: Mapping[tuple[str, ...], list[Place]]) -> list[list[Place]]:
    """Groups of equal points; the places of one that was not timed follow those of an equal one that was."""
    groups = {key: list(places) for key, places in equal.items()}
    timed: dict[tuple[str, ...], tuple[str, ...]] = {}
    for key in equal:
        timed.setdefault(key[:-1], key)
    for key in equal.keys() & timed.keys():
        groups[timed[key]] += groups.pop(key)
    return list(groups.values())


def _content(point: Point) -> dict[str, Any]:
    """A point without what was measured on a device."""
    return {name: value for name, value in point.items() if name not in SPEEDS}


def variants_of(runs: Sequence[Run], seeds: Sequence[Sequence[Place]]) -> list[str]:
    """What tells runs of the same policy apart: number of images and settings that differ, else the name, else "".

    A setting that has the value of the policy's file is left out.
    """
    groups: dict[Any, list[int]] = defaultdict(list)
    for r, run in enumerate(runs):
        policies = frozenset(point["policy"] for point in run.result["points"]) - {"none"}
        groups[_setting(run), hardware_name(run.result["environment"]), policies].append(r)
    variants = [""] * len(runs)
    others = {place for group in seeds for place in group[1:]}  # shown as one point with the first of their group
    for members in groups.values():
        settings = {r: {"images": _images(runs[r]), **dict(flatten(runs[r].result["config"]))} for r in members}
        keys = dict.fromkeys(key for flat in settings.values() for key in flat)
        varied = [key for key in keys if _differs(key, list(settings.values()))]
        for r in members:
            usual = usual_settings(runs[r].result)
            named = [
                f"{key.removeprefix('mtr.')}={settings[r].get(key)}"
                for key in varied
                if key not in usual or settings[r].get(key) != usual[key]
            ]
            variants[r] = ", ".join(named[:_NAMED_SETTINGS] + ["…"] * (len(named) > _NAMED_SETTINGS))
        alike: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for r in members:
            for i, point in enumerate(runs[r].result["points"]):
                if point["policy"] != "none" and (r, i) not in others:
                    alike[variants[r], name_of(point)][json.dumps(_content(point), sort_keys=True)].append(r)
        for r in {r for unlike in alike.values() if len(unlike) > 1 for same in unlike.values() for r in same}:
            variants[r] = f"{variants[r]} ({runs[r].name})".lstrip()
    return variants


def _differs(key: str, settings: Sequence[Mapping[str, str]]) -> bool:
    """Whether a setting differs among runs, unless it chooses images and their number already tells the runs apart."""
    values = {(flat["images"], flat.get(key)) for flat in settings}
    implied = key.startswith("dataset.") and len(values) == len({images for images, _ in values})
    return not implied and len({value for _, value in values}) > 1


def _images(run: Run) -> str:
    """The number of images of a run, with those that could not be read."""
    point = run.result["points"][0]
    return str(point["images"] + len(point["skipped"]))


def differences_of(runs: Sequence[Run], shown: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Compare each point with its unreduced model, and with the points of other policies or runs at its ratio.

    A smaller model is compared with all points. P-values are corrected for the number of comparisons, those with
    unreduced points and the others apart. Of more than ``PAIRS`` comparisons at the same ratio, only those with
    ``BASELINES`` are made, one run each; and of more than ``PAIRS`` in all, intervals have ``FEW_RESAMPLES``.

    Args:
        shown: of ``points_of``; seeds are compared as their mean.

    Returns:
        The differences of all points that can be paired, and notes why others cannot.
    """
    sets, notes = _paired_sets(runs)
    differences = []
    for samples in sets:
        members = [(point, sources) for point in shown if (sources := _sources(point, samples))]
        places = {place: a for a, (point, _) in enumerate(members) for place in point["places"]}
        points: list[Point] = [runs[point["run"]].result["points"][point["point"]] for point, _ in members]
        reduced = [b for b, point in enumerate(points) if point["policy"] != "none"]
        to_unreduced = [(places[members[b][1][0][0], 0], b) for b in reduced]
        groups = _by_budget(points, reduced)
        firsts = set(reduced)
        if sum(len(group) ** 2 for group in groups) > 2 * PAIRS:
            firsts = _baselines(points, [sources[0][0] for _, sources in members])
            notes.append(
                f"Of {len(reduced)} points, only those of {', '.join(BASELINES)} and smaller models, one run each, are "
                "baselines of paired differences: give fewer runs to compare all points with each other."
            )
        others = sorted(
            {(min(a, b), max(a, b)) for group in groups for a in firsts & set(group) for b in group if a != b}
        )
        pairs = [*to_unreduced, *others]
        means = [_summed([samples[r].metrics[i] for r, i in sources]) for _, sources in members]
        counts = [len(sources) for _, sources in members]
        resamples = RESAMPLES if len(pairs) <= PAIRS else FEW_RESAMPLES
        compared = compare_all(means, pairs, runs=counts, resamples=resamples)
        pooled = [_averaged([samples[r].pooled[i] for r, i in sources]) for _, sources in members]
        for (a, b), row in zip(pairs, compared, strict=True):
            row |= {name: figure.minus(pooled[a][name]) for name, figure in pooled[b].items()}
        for rows in (compared[: len(to_unreduced)], compared[len(to_unreduced) :]):  # two tables of the page
            correct(rows)
        differences += [
            {"first": members[a][1][0], "second": members[b][1][0], **row}
            for (a, b), row in zip(pairs, compared, strict=True)
        ]
    return differences, list(dict.fromkeys(notes))


def _paired_sets(runs: Sequence[Run]) -> tuple[list[dict[int, Sample]], list[str]]:
    """The samples of runs on the same images, by the runs' indices, and notes about runs that have others."""
    sets: dict[tuple[str, ...], list[dict[int, Sample]]] = defaultdict(list)
    notes = []
    for r, run in enumerate(runs):
        if run.sample is None:
            continue
        alternatives = sets[_setting(run)]
        for members in alternatives:
            first = next(iter(members))
            try:
                check_same_images(members[first].hashes, run.sample.hashes, f"{runs[first].name} and {run.name}")
            except UserError as error:
                reason = str(error)
            else:
                members[r] = run.sample
                break
        else:
            if alternatives:
                notes.append(reason)
            alternatives.append({r: run.sample})
    return [members for alternatives in sets.values() for members in alternatives], notes


def _sources(point: Mapping[str, Any], samples: Mapping[int, Sample]) -> Sequence[Place]:
    """The points from whose predictions a shown point is compared: all seeds, or one of equal points; else none."""
    readable = [place for place in point["places"] if place[0] in samples]
    if "mean" in point:
        return readable if len(readable) == len(point["places"]) else []
    return [place for place in readable if place[0] == point["run"]][:1] or readable[:1]


def _baselines(points: Sequence[Point], runs: Sequence[int]) -> set[int]:
    """The points of the first run of each of ``BASELINES``, and of smaller models; ``runs`` has each point's run."""
    first: dict[str, int] = {}
    for point, run in zip(points, runs, strict=True):
        first.setdefault(point["policy"], run)
    return {
        a
        for a, (point, run) in enumerate(zip(points, runs, strict=True))
        if "model" in point or (point["policy"] in BASELINES and run == first[point["policy"]])
    }


def _summed(metrics: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The metrics of each image, summed over runs."""
    return {name: np.sum([of_run[name] for of_run in metrics], axis=0) for name in metrics[0]}


def _averaged(figures: Sequence[dict[str, Drawn]]) -> dict[str, Drawn]:
    """The means of pooled figures over runs."""
    return {
        name: Drawn(*(np.mean(part, axis=0) for part in zip(*(of_run[name] for of_run in figures), strict=True)))
        for name in figures[0]
    }


def _by_budget(points: Sequence[Point], reduced: Sequence[int]) -> list[list[int]]:
    """Groups of reduced points that are compared: those of one budget, and each smaller model with every point."""
    groups: dict[str, list[int]] = defaultdict(list)
    models = [a for a in reduced if "model" in points[a]]
    for a in reduced:
        asked = point_name("", points[a]["ratio"], budget=points[a].get("budget"))
        if asked and "model" not in points[a]:
            groups[asked].append(a)
    unlike = [(a, b) for a in models for b in reduced if points[a]["model"] != points[b].get("model")]
    return [*groups.values(), *map(list, unlike)]
