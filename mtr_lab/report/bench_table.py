"""The rows of a ``bench.json`` as a table for a terminal, 80 columns or wider."""

from collections.abc import Mapping, Sequence
from typing import Any

from mtr_lab.report.table import figure, percent
from mtr_lab.report.two_line_table import TwoLines, TwoLineTable, two_line_table
from mtr_lab.report.wording import shown_name
from mtr_lab.results.environment import hardware_name

_HEADINGS = (
    ("backbone", "backend"),
    ("batch", "pixels"),
    ("dtype", "graph"),
    ("policy", "ratio %"),
    ("ms", "when idle"),
    ("img/s", "MiB"),
    ("speedup", "overh. %"),
    ("of bound", "limit"),
)


def bench_table(result: Mapping[str, Any]) -> TwoLineTable:
    """Lay out the rows of a bench.json, two lines each; errors and notes are below the table."""
    machine = result["environment"]
    title = f"{hardware_name(machine)} · torch {machine['torch']}"
    return two_line_table(title, _remarks(result), _HEADINGS, map(_cells, result["rows"]))


def _cells(row: Mapping[str, Any]) -> list[TwoLines]:
    axes = [
        (row["backbone"], row["backend"]),
        (str(row["batch"]), _pixels(row)),
        (row["dtype"], "graph" if row["cuda_graph"] else ""),
        (shown_name(row["policy"]), _asked(row)),
    ]
    if row["error"] is not None:
        return [*axes, ("failed", ""), ("", ""), ("", ""), ("", "")]
    return [
        *axes,
        (figure(row["ms"]), figure(row["idle_ms"])),
        (figure(row["img_per_s"]), figure(row["peak_mib"])),
        (figure(row["speedup"]), percent(row["overhead"])),
        (f"{percent(row['roofline'])} %", _limit(row)),
    ]


def _examples(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The overhead and the share of the bound of a row, with the figures behind them; empty without such a row.

    The row is the first reduced one, else the first.
    """
    timed = [row for row in rows if row["error"] is None]
    reduced = [row for row in timed if row["overhead"] is not None and row["policy"] != "none"]
    if not timed:
        return "", ""
    row = (reduced or timed)[0]
    name, ms = f"; {shown_name(row['policy'])} {_asked(row)}".rstrip(), row["ms"]
    bound = f"{name}: {figure(row['roofline'] * ms)} / {figure(ms)} ms = {percent(row['roofline'])} %"
    if not reduced:
        return "", bound
    whole, share = row["speedup"] * ms, (1 - row["overhead"]) / row["speedup"]
    overhead = f"1 - {figure(whole)} ms × {percent(share)} % / {figure(ms)} ms = {percent(row['overhead'])} %"
    return f"{name}: {overhead}", bound


def _limit(row: Mapping[str, Any]) -> str:
    """The name of the limit that sets the bound."""
    bound = {name: ms for name, ms in row["bound_ms"].items() if ms is not None}
    return max(bound, key=lambda name: bound[name])


def _pixels(row: Mapping[str, Any]) -> str:
    """The side of the images, and that of the picture if the policy resizes it."""
    side = row["resolution"]
    return f"{side}²" if row.get("picture", [side, side]) == [side, side] else f"{side}² → {row['picture'][0]}²"


def _asked(row: Mapping[str, Any]) -> str:
    """The ratio, or the speed-up that was asked for and the one that was promised."""
    if row.get("asked_speedup") is None:
        return percent(row["ratio"])
    return f"≥{figure(row['asked_speedup'])}×, {figure(row['promised_speedup'])}"


def _remarks(result: Mapping[str, Any]) -> list[str]:
    peaks = [
        f"{dtype}: {figure(peak['flops'], 1e-12)} TFLOP/s, {figure(peak['bytes'], 1e-9)} GB/s"
        for dtype, peak in result["peaks"].items()
    ]
    failures = [
        f"{row['backbone']} {row['policy']}@{row.get('asked_speedup') or row['ratio']} {row['backend']}: {row['error']}"
        for row in result["rows"]
        if row["error"] is not None
    ]
    overhead, bound = _examples(result["rows"])
    return [
        "ms: median time of a batch in a steady stream; below, of a single batch on an idle GPU (equal on a CPU)",
        *(
            ["ratio %: or the speedup that was asked for, and the promised one"]
            if any(row.get("asked_speedup") for row in result["rows"])
            else []
        ),
        f"overh.: share of the time above the unreduced time scaled by the tokens{overhead}",
        f"of bound: least time that the strictest limit of the device allows, divided by the measured time{bound}",
        f"peak of the device, {'; '.join(peaks)}",
        *failures,
        *result["notes"],
    ]
