"""Figures for papers: one column wide, 8 pt, as PDF, SVG or PNG. Needs Matplotlib (extra ``report``)."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtr_lab.errors import UserError, unknown
from mtr_lab.packages import require
from mtr_lab.report.dashboard.reader import Reader
from mtr_lab.report.looks import MATPLOTLIB_MARKERS, look
from mtr_lab.report.wording import shown_name
from mtr_lab.results.atomic import write_output
from mtr_lab.results.metrics import accuracy, all_metrics
from mtr_lab.results.metrics.metric import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".pdf", ".svg", ".png")
COLUMN_INCHES = 3.25
"""The width of a column of a two-column paper."""
_STYLE: Any = {
    "font.size": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.0,
    "lines.markersize": 4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text, which journals ask for
    "svg.fonttype": "none",
    "svg.hashsalt": "mtr_lab",  # equal results, equal files
}
_DODGE, _DODGED = 1.4, 7.0
"""How far neighbouring lines are moved apart, and all of them at most, pt: the intervals of policies at the same cost
would cover each other."""
_NAMED_LINES = 16
"""A legend of more lines names policies alone, without their settings."""
_LEGEND_CHARACTERS, _LEGEND_ROW_INCHES = 60, 0.14
"""What a line of a legend has room for, and its height."""
Point = Mapping[str, Any]


def write_figure(paths: Sequence[Path], output: Path, chart: str = "accuracy") -> None:
    """Draw a chart of some results, and write it to a file whose ending is one of ``FORMATS``.

    Args:
        paths: see ``Reader``.
        output: the file; it appears complete or not at all.
        chart: one of ``CHARTS``.

    Raises:
        UserError: no such chart; no result, or results of several tasks; Matplotlib is not installed; the results have
            no such figures; the file cannot be written.
    """
    if chart not in CHARTS:
        raise unknown("chart", chart, CHARTS)
    require("matplotlib", "report", "a figure")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = Reader(paths).data()
    points = _points(data)
    tasks = sorted({point["task"] for point in points})
    if len(tasks) != 1:
        raise UserError(
            f"a figure shows one task, these results have {', '.join(tasks) or 'none'}: give the runs of one task."
        )
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(COLUMN_INCHES, 0.75 * COLUMN_INCHES), layout="constrained")
        CHARTS[chart](axes, points)
        stream = io.BytesIO()
        undated = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(output.suffix)
        figure.savefig(stream, format=output.suffix[1:], dpi=300, metadata=undated)
        plt.close(figure)
    write_output(output, stream.getvalue())


def _points(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points of a report, each with its task, its backbone and the name of its line."""
    points = []
    for place in data["points"]:
        run = data["runs"][place["run"]]
        point = {**run["result"]["points"][place["point"]], **place.get("mean", {})}
        variant = "" if point["policy"] == "none" else run["variant"]
        line = " ".join(filter(None, [point["policy"], f"({variant})" if variant else ""]))
        points.append({**point, "line": line, **{key: run["result"][key] for key in ("task", "backbone")}})
    return points


def _trade_off(axes: "Axes", points: Sequence[Point], metric: Metric, x_key: str, x_scale: float, x_title: str) -> None:
    from matplotlib.transforms import offset_copy

    drawn = [point for point in points if point.get(metric.key) is not None and point.get(x_key) is not None]
    if not any(point["policy"] != "none" for point in drawn):
        raise UserError(f"no reduced point has both {metric.name} and {x_title.split(',')[0]}: choose another --chart.")
    scale = 100 if metric.unit == "%" else 1
    unreduced = None
    for base in {round(scale * point[metric.key], 6) for point in drawn if point["policy"] == "none"}:
        unreduced = axes.axhline(base, color=look("none").colour, linewidth=0.6, linestyle=":")
    lines: dict[tuple[str, str], list[Point]] = {}
    for point in drawn:
        if point["policy"] != "none":
            lines.setdefault((point["line"], point["backbone"]), []).append(point)
    several = len({backbone for _, backbone in lines}) > 1
    step = min(_DODGE, _DODGED / len(lines))
    for place, ((line, backbone), members) in enumerate(sorted(lines.items())):
        members = sorted(members, key=lambda point: point[x_key])
        aside = step * (place - (len(lines) - 1) / 2)
        own = look(members[0]["policy"])
        axes.errorbar(
            [x_scale * point[x_key] for point in members],
            [scale * point[metric.key] for point in members],
            yerr=_bars(members, metric.key, scale),
            xerr=_bars(members, x_key, x_scale),
            color=own.colour,
            marker=MATPLOTLIB_MARKERS[own.marker],
            label=f"{line}, {backbone}" if several else line,
            elinewidth=0.5,
            capsize=1.5,
            transform=offset_copy(axes.transData, axes.get_figure(root=True), x=aside, units="points"),
        )
        axes.update_datalim(
            [
                corner
                for point in members
                for corner in zip(
                    [x_scale * end for end in _ends(point, x_key)],
                    [scale * end for end in _ends(point, metric.key)],
                    strict=True,
                )
            ]
        )
    axes.margins(x=0.05 + step * len(lines) / (2 * 72 * COLUMN_INCHES))
    axes.autoscale_view()
    axes.set(xlabel=x_title, ylabel=f"{metric.name}, {metric.unit}")
    handles, labels = axes.get_legend_handles_labels()
    names = labels if len(labels) <= _NAMED_LINES else [members[0]["policy"] for _, members in sorted(lines.items())]
    entries = dict(zip(names, handles, strict=True))
    _legend(axes, entries if unreduced is None else {**entries, shown_name("none"): unreduced})


def _legend(axes: "Axes", handles: Mapping[str, Any]) -> None:
    """A legend below the axes, where it covers no interval; the figure grows by its height."""
    figure: Any = axes.get_figure(root=True)
    columns = max(1, min(4, int(_LEGEND_CHARACTERS / (5 + max(map(len, handles))))))
    rows = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + rows * _LEGEND_ROW_INCHES)
    options = {"columnspacing": 1, "handlelength": 1.5, "handletextpad": 0.5, "labelspacing": 0.3}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, **options)


def _bars(members: Sequence[Point], key: str, scale: float) -> list[list[float]] | None:
    """How far the interval of each point, or one standard deviation over seeds, reaches down and up."""
    reach = []
    for point in members:
        (low, high), value = _ends(point, key), point[key]
        reach.append([scale * max(0.0, value - low), scale * max(0.0, high - value)])
    return [list(side) for side in zip(*reach, strict=True)] if any(map(any, reach)) else None


def _ends(point: Point, key: str) -> tuple[float, float]:
    value, sd = point[key], point.get(f"{key}_sd")
    return (value - sd, value + sd) if sd is not None else point.get(f"{key}_ci") or (value, value)


def _accuracy(points: Sequence[Point]) -> Metric:
    metric = accuracy(points)
    if metric is None:
        raise UserError("these results have no accuracy: choose another --chart.")
    return metric


def _accuracy_chart(axes: "Axes", points: Sequence[Point]) -> None:
    _trade_off(axes, points, _accuracy(points), "flops_true", 1e-9, "True GFLOPs per image")


def _speed_chart(axes: "Axes", points: Sequence[Point]) -> None:
    _trade_off(axes, points, _accuracy(points), "speedup", 1, "Speed, × unreduced")


def _kl_chart(axes: "Axes", points: Sequence[Point]) -> None:
    (kl,) = (metric for metric in all_metrics() if metric.key == "kl")
    _trade_off(axes, points, kl, "flops_true", 1e-9, "True GFLOPs per image")


def _tokens_chart(axes: "Axes", points: Sequence[Point]) -> None:
    """The tokens that enter each block; equal schedules are one line."""
    schedules: dict[tuple[int, ...], list[Point]] = {}
    for point in points:
        if point["tokens"]:
            schedules.setdefault(tuple(point["tokens"]), []).append(point)
    if not schedules:
        raise UserError("these results have no token counts: choose another --chart.")
    for tokens, members in schedules.items():
        policies = sorted({point["policy"] for point in members})
        own = look(policies[0] if len(policies) == 1 else "none")
        label = ", ".join(map(shown_name, policies))
        style = ":" if policies == ["none"] else "-"
        axes.step(
            [*range(len(tokens) + 1)], [*tokens, tokens[-1]], where="post", color=own.colour, ls=style, label=label
        )
    axes.set(xlabel="Block, counted from 0", ylabel="Tokens entering the block", ylim=(0, None))
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    _legend(axes, unique)


CHARTS: dict[str, Callable[["Axes", Sequence[Point]], None]] = {
    "accuracy": _accuracy_chart,
    "kl": _kl_chart,
    "speed": _speed_chart,
    "tokens": _tokens_chart,
}
"""The charts by name: the accuracy of the task against FLOPs, KL against FLOPs, accuracy against speed, tokens."""
