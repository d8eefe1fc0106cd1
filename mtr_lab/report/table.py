"""A result as one table for a terminal, 80 columns or wider."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from mtr_lab.report.baselines import BASELINES
from mtr_lab.report.two_line_table import Cell, Saving, TwoLines, TwoLineTable, two_line_table
from mtr_lab.report.wording import counted, shown_name
from mtr_lab.results.best_resolution import best_resolution
from mtr_lab.results.metrics import accuracy, all_metrics, shown_metrics
from mtr_lab.results.metrics.metric import Metric
from mtr_lab.results.predictions import name_of
from mtr_lab.results.schema import Interval, Number, Result
from mtr_lab.results.seeds import mean_point, seed_groups

_NAMED_FILES = 3  # of the skipped ones, in the caption
_ABSENT = "–"
_PROMISES = {
    "speedup": "prom., meas.: × promised from the times of blocks, measured in the timing pass",
    "max_drop": "prom., meas.: % of images that change class, on calibration images and on these",
}
"""What a budget is, by its key."""


class _Column(NamedTuple):
    """A column: its heading, the key that a point must have for it to be shown, and the cell of a point."""

    heading: TwoLines
    key: str
    cell: Callable[[Mapping[str, Any]], TwoLines]


def result_table(result: Result) -> TwoLineTable:
    """Lay out the points of a result, one per row, with two lines per cell.

    Shares are in percent; below a metric is its interval of level 0.95. There is no column for figures that no point
    has: metrics of other tasks, speeds that were not measured.
    """
    return _table(result, result["points"], published(result))


def sweep_tables(results: Sequence[Result], differences: Sequence[Mapping[str, Any]] = ()) -> list[TwoLineTable]:
    """All policies of a sweep beside each other, by the FLOPs they remove; a table for each backbone and dataset.

    No table where a single run has all points, or where settings besides the policy vary. Runs are timed apart, so
    speeds are relative to the unreduced model of the same run.

    Args:
        differences: of pairs of points, see ``mtr_lab.report.dashboard.points.differences_of``; those with the first
            policy of ``BASELINES`` in the sweep become a column.
    """
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for r, result in enumerate(results):
        groups[result["backbone"], result["task"], result["dataset"]].append(r)
    laid_out = []
    for members in groups.values():
        places = [(r, i) for r in members for i in range(len(results[r]["points"]))]
        points: dict[tuple[int, int], dict[str, Any]] = {(r, i): dict(results[r]["points"][i]) for r, i in places}
        unreduced, reduced = points[places[0]], [point for point in points.values() if point["policy"] != "none"]
        names = {name_of(point) for point in reduced}
        if len(members) > 1 and len(names) == len(reduced) > 1:
            remarks = _add_differences(points, differences)
            reduced.sort(key=lambda point: (point["ratio"] or point["reduction"] or 0, point["policy"]))
            laid_out.append(_table(results[members[0]], [unreduced, *reduced], remarks, runs=len(members)))
    return laid_out


def _add_differences(points: Mapping[Any, dict[str, Any]], differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """Give points their ``paired`` difference in accuracy to the baseline at their ratio; say which it is."""
    metric = accuracy(list(points.values()))
    policies = {point["policy"] for point in points.values()}
    baseline = next((name for name in BASELINES if name in policies), None)
    if metric is None or baseline is None:
        return []
    for pair in differences:
        for one, other, sign in (("first", "second", 1), ("second", "first", -1)):
            base, point = points.get(tuple(pair[one])), points.get(tuple(pair[other]))
            if base is not None and point is not None and base["policy"] == baseline and metric.key in pair:
                difference = pair[metric.key]
                value, ends = sign * difference["difference"], sorted(sign * end for end in difference["ci"])
                better = metric.better * value > 0
                mark = " " if difference["p_holm"] >= 0.05 else "▲" if better else "▼"
                point["paired"] = {"value": value, "ci": ends, "mark": mark}
    if not any("paired" in point for point in points.values()):
        return []
    return [
        f"Δ: {metric.name} minus that of {baseline} at the same ratio, in pairs; "
        "▲ better, ▼ worse: p < 0.05, Holm's correction"
    ]


def seed_tables(results: Sequence[Result]) -> list[TwoLineTable]:
    """Means over the runs that differ only in ``mtr.seed``, one row per ratio, below the unreduced model.

    The second line of a metric's cell is its standard deviation over the seeds. Each backbone, task and dataset has its
    own table; there is no table without such runs.
    """
    tables: dict[tuple[str, ...], list[list[tuple[int, int]]]] = defaultdict(list)
    for group in seed_groups(results):
        first = results[group[0][0]]
        tables[first["backbone"], first["task"], first["dataset"]].append(group)
    laid_out = []
    for groups in tables.values():
        first = results[groups[0][0][0]]
        unreduced = [point for point in first["points"] if point["policy"] == "none"]
        laid_out.append(_table(first, [*unreduced, *(mean_point(results, group) for group in groups)], []))
    return laid_out


def _table(result: Result, points: Sequence[Mapping[str, Any]], remarks: list[str], runs: int = 1) -> TwoLineTable:
    best = best_resolution(points)
    metrics = [column for metric in all_metrics() for column in _metric_columns(metric)]
    speeds: Sequence[_Column] = _SPEEDS if runs == 1 else _RELATIVE_SPEEDS
    columns = [c for c in (*_COSTS, *metrics, _PAIRED, *speeds) if any(c.key in point for point in points)]
    bests = _bests(points)
    return two_line_table(
        f"{result['backbone']} · {result['task']} · {result['dataset']}",
        [*_caption(points, result["task"]), *([] if best is None else [best]), *remarks],
        [column.heading for column in columns],
        (
            [Cell(*column.cell(point)[:2], (i, column.key) in bests) for column in columns]
            for i, point in enumerate(points)
        ),
        savings=[
            Saving(i, whole, stacked=key not in _BESIDE)
            for key, whole in _SAVINGS
            for i, column in enumerate(columns)
            if column.key == key
        ],
    )


def _bests(points: Sequence[Mapping[str, Any]]) -> set[tuple[int, str]]:
    """The places and keys of the best figures among several policies that were asked for the same."""
    axes = [(metric.key, metric.better) for metric in all_metrics()] + [("speedup", 1)]
    groups: dict[str, list[int]] = defaultdict(list)
    for i, point in enumerate(points):
        if point["policy"] != "none":
            groups[_asked(point)].append(i)
    bests = set()
    for members in groups.values():
        for key, better in axes:
            values = {i: better * points[i][key] for i in members if points[i].get(key) is not None}
            if len(values) > 1:
                bests |= {(i, key) for i, value in values.items() if value == max(values.values())}
    return bests


def published(result: Result) -> list[str]:
    """The published top-1 of the weights beside the measured one, as a line; no line unless both are of ImageNet-1k."""
    top1 = result.get("weights", {}).get("published_top1")
    measured: Mapping[str, Any] | None = next((point for point in result["points"] if point["policy"] == "none"), None)
    if top1 is None or result["dataset"] != "imagenet" or measured is None:
        return []
    return [
        f"{result['backbone']}: published top-1 {percent(top1)} %, measured {100 * (measured.get('top1') or 0):.2f} % "
        f"on {counted({measured['images']}, result['task'])}"
    ]


def _caption(points: Sequence[Mapping[str, Any]], task: str) -> list[str]:
    images = counted({point["images"] for point in points}, task)
    units = [f"{metric.name} in {metric.unit}" for metric in shown_metrics(points) if metric.unit != "%"]
    latency = ["p50, p95: latency of one image in ms"] if any("latency_ms" in point for point in points) else []
    if any("speedup" in point for point in points):
        latency.append("×: speed over the unreduced model of the same run")
    lines = [
        "; ".join([images, "95 % intervals", *units, *latency]),
        *(["±: standard deviation over the seeds"] if any("seeds" in point for point in points) else []),
        "cut: share of true FLOPs removed; lit.: FLOPs as counted in the literature",
    ]
    keys = dict.fromkeys(point["budget"]["key"] for point in points if "budget" in point)
    lines += [_PROMISES[key] for key in keys if key in _PROMISES]
    skipped = list(dict.fromkeys(file for point in points for file in point["skipped"]))
    if skipped:
        named = ", ".join(skipped[:_NAMED_FILES]) + (", …" if len(skipped) > _NAMED_FILES else "")
        lines.append(f"skipped {len(skipped)} unreadable file{'s' * (len(skipped) > 1)}: {named}")
    return lines


def figure(value: Number, scale: float = 1) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return _ABSENT
    value *= scale
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def percent(share: Number) -> str:
    """A fraction in percent, one decimal."""
    return _ABSENT if share is None else f"{100 * share:.1f}".replace("100.0", "100")


def nats(value: Number) -> str:
    """A divergence, three decimals or three significant digits."""
    return _ABSENT if value is None else f"{value:.3f}" if value < 1 else f"{value:#.3g}"


def _short_nats(value: Number) -> str:
    return nats(value).removeprefix("0")  # .140–.158 is as wide as an interval in percent


def _uncertainty(point: Mapping[str, Any], key: str, written: Callable[[Number], str]) -> str:
    """The standard deviation over seeds, or the interval; "" for a certain figure, whose interval is a point."""
    if point.get(f"{key}_sd") is not None:
        return f"± {written(point[f'{key}_sd'])}"
    interval: Interval | None = point.get(f"{key}_ci")
    if not interval or interval[0] == interval[1]:
        return ""
    return "–".join(written(end) for end in interval)


def _policy(point: Mapping[str, Any]) -> TwoLines:
    return shown_name(point["policy"]), f"{len(point['seeds'])} seeds" if "seeds" in point else ""


def _tokens(point: Mapping[str, Any]) -> TwoLines:
    tokens = point["tokens"] or [0]
    return str(tokens[0]), f"→ {tokens[-1]}" if tokens[-1] != tokens[0] else ""


def _latency(point: Mapping[str, Any]) -> TwoLines:
    latency = point.get("latency_ms")
    return (figure(latency["p50"]), figure(latency["p95"])) if latency else (_ABSENT, "")


def _speedup(point: Mapping[str, Any]) -> TwoLines:
    return figure(point.get("speedup")), _uncertainty(point, "speedup", figure)


def _paired(point: Mapping[str, Any]) -> TwoLines:
    if (paired := point.get("paired")) is None:
        return "", ""
    ends = "–".join(f"{100 * end:+.1f}" for end in paired["ci"])
    return f"{100 * paired['value']:+.1f}{paired['mark']}", ends


def _metric_columns(metric: Metric) -> Iterator[_Column]:
    """A metric with its interval, and its difference to the unreduced model if the result has that."""
    written, short = (percent, percent) if metric.unit == "%" else (nats, _short_nats)
    unit = "%" if metric.unit == "%" else ""

    def cell(point: Mapping[str, Any], key: str) -> TwoLines:
        return written(point.get(key)), _uncertainty(point, key, short)

    for key in metric.keys:
        heading = metric.heading if key == metric.key else f"Δ{metric.heading}"
        yield _Column((heading, unit), key, partial(cell, key=key))


def _asked(point: Mapping[str, Any]) -> str:
    """The ratio in percent, or the other budget that was given instead."""
    if (budget := point.get("budget")) is None:
        return percent(point["ratio"])
    return f"≥{budget['asked']:g}×" if budget["key"] == "speedup" else f"≤{100 * budget['asked']:g} %"


def _promise(point: Mapping[str, Any]) -> TwoLines:
    """What was promised of a budget, and what was measured: a speed-up is that of the column ×."""
    if (budget := point.get("budget")) is None:
        return "", ""
    if budget["key"] == "speedup":
        return figure(budget["promised"]), figure(point.get("speedup", budget["measured"]))
    return percent(budget["promised"]), percent(budget["measured"])


_COSTS = (
    _Column(("policy", ""), "policy", _policy),
    _Column(("cut %", "asked"), "reduction", lambda point: (percent(point["reduction"]), _asked(point))),
    _Column(("prom.", "meas."), "budget", _promise),
    _Column(
        ("GFLOPs", "lit."),
        "flops_true",
        lambda point: (figure(point["flops_true"], 1e-9), figure(point["flops_literature"], 1e-9)),
    ),
    _Column(("picture", "px"), "resolution", lambda point: ("×".join(map(str, point.get("resolution", ()))), "")),
    _Column(("tokens", ""), "tokens", _tokens),
)
_PAIRED = _Column(("Δ", "paired"), "paired", _paired)
_TIMES = _Column(("×", ""), "speedup", _speedup)
_RELATIVE_SPEEDS = (_TIMES,)
_SPEEDS = (
    _Column(
        ("img/s", "MiB"),
        "img_per_s",
        lambda point: (figure(point.get("img_per_s")), figure(point.get("peak_mib")) if "peak_mib" in point else ""),
    ),
    _TIMES,
    _Column(("p50", "p95"), "latency_ms", _latency),
)
_BESIDE = ("flops_true", "img_per_s", "latency_ms")  # columns whose qualifiers are no wider than their figures
_SAVINGS = (
    *((key, False) for key in (*_BESIDE, "top5", "agreement", "speedup")),
    *((key, True) for key in ("balanced_accuracy", "top5", "resolution", "tokens", "agreement")),
)
"""What a narrow window does without, in this order: qualifiers, then whole columns."""
