"""A result as one table for a terminal, 80 columns or wider."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rich.table import Table

from mtr_lab.report.result import Interval, Number, Point, Result
from mtr_lab.report.two_line_table import TwoLines, two_line_table

_NAMED_FILES = 3  # of the skipped ones, in the caption
_ABSENT = "–"


class _Column(NamedTuple):
    """Two lines of heading, the point's key without which the column is left out, and two lines of cell."""

    heading: TwoLines
    key: str
    cell: Callable[[Point], TwoLines]


def result_table(result: Result) -> Table:
    """Lay out the points of a result, one a row; the second line of a cell qualifies the first.

    Accuracies, agreement and FLOPs removed are in percent, with the interval of level 0.95 below. Metrics that no point
    has (those of other tasks, timing that was not asked for) get no column.
    """
    points = result["points"]
    columns = [column for column in _COLUMNS if any(column.key in point for point in points)]
    return two_line_table(
        f"{result['backbone']} · {result['task']} · {result['dataset']}",
        [*_caption(points), *published(result)],
        [column.heading for column in columns],
        ([column.cell(point) for column in columns] for point in points),
    )


def published(result: Result) -> list[str]:
    """What the authors of the weights report, beside what was measured; no line unless both are of ImageNet-1k."""
    top1 = result.get("weights", {}).get("published_top1")
    measured = next((point for point in result["points"] if point["policy"] == "none"), None)
    if top1 is None or result["dataset"] != "imagenet" or measured is None:
        return []
    return [
        f"{result['backbone']}: published top-1 {percent(top1)} %, measured {100 * (measured.get('top1') or 0):.2f} % "
        f"on {measured['images']} images"
    ]


def _caption(points: list[Point]) -> list[str]:
    counts = {point["images"] for point in points}
    images = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}" if counts else "no"
    explained = {"kl": "KL in nats", "latency_ms": "p50, p95: latency of one image in ms"}
    shown = [text for key, text in explained.items() if any(key in point for point in points)]
    lines = [
        "; ".join([f"{images} images", "95 % intervals", *shown]),
        "cut: share of true FLOPs removed; lit.: FLOPs as the literature counts them",
    ]
    skipped = list(dict.fromkeys(file for point in points for file in point["skipped"]))
    if skipped:
        named = ", ".join(skipped[:_NAMED_FILES]) + (", …" if len(skipped) > _NAMED_FILES else "")
        lines.append(f"skipped {len(skipped)} that could not be read: {named}")
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


def _nats(value: Number) -> str:
    return _ABSENT if value is None else f"{value:.3f}" if value < 1 else f"{value:#.3g}"


def _short_nats(value: Number) -> str:
    return _nats(value).removeprefix("0")  # .140–.158 is no wider than an interval in percent


def _interval(interval: Interval | None, written: Callable[[Number], str]) -> str:
    """Nothing for the unreduced model's agreement with itself, which has no uncertainty."""
    if not interval or interval[0] == interval[1]:
        return ""
    return "–".join(written(end) for end in interval)


def _tokens(point: Point) -> TwoLines:
    tokens = point["tokens"] or [0]
    return str(tokens[0]), f"→ {tokens[-1]}" if tokens[-1] != tokens[0] else ""


def _latency(point: Point) -> TwoLines:
    latency = point.get("latency_ms")
    return (figure(latency["p50"]), figure(latency["p95"])) if latency else (_ABSENT, "")


def _share(heading: str, key: str) -> _Column:
    """A metric that is a fraction, in percent, with its interval."""

    def cell(point: Mapping[str, Any]) -> TwoLines:
        return percent(point.get(key)), _interval(point.get(f"{key}_ci"), percent)

    return _Column((heading, "%"), key, cell)


_COLUMNS = (
    _Column(("policy", ""), "policy", lambda point: (point["policy"], "")),
    _Column(("cut %", "asked"), "reduction", lambda point: (percent(point["reduction"]), percent(point["ratio"]))),
    _Column(
        ("GFLOPs", "lit."),
        "flops_true",
        lambda point: (figure(point["flops_true"], 1e-9), figure(point["flops_literature"], 1e-9)),
    ),
    _Column(("tokens", ""), "tokens", _tokens),
    _share("top-1", "top1"),
    _share("top-5", "top5"),
    _share("mIoU", "miou"),
    _share("ΔmIoU", "miou_difference"),
    _share("AP", "map"),
    _share("AP50", "ap50"),
    _share("agree", "agreement"),
    _Column(("KL", ""), "kl", lambda point: (_nats(point.get("kl")), _interval(point.get("kl_ci"), _short_nats))),
    _Column(
        ("img/s", "MiB"),
        "img_per_s",
        lambda point: (figure(point.get("img_per_s")), figure(point.get("peak_mib")) if "peak_mib" in point else ""),
    ),
    _Column(("p50", "p95"), "latency_ms", _latency),
)
