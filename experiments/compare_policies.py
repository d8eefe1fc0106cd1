"""Compare the lines of one sweep in pairs: ``python experiments/compare_policies.py SWEEP OUT.json [BASELINE …]``.

SWEEP has run folders, all on the same images: of policies at the same ratios, of ``resolution`` at several sizes, of
smaller models. The script prints an overview and a table in Markdown, and writes the table to OUT.json with the paired
differences to every baseline (by default ``mtr``, ``write`` and ``resolution``). Intervals are of the bootstrap over
images with 10 000 resamples; p-values of top-1 and agreement are McNemar's, corrected by Holm for all rows with the
same baseline.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtr_lab.report.dashboard.runs import read_run, smaller_models
from mtr_lab.results.best_resolution import best_resolution
from mtr_lab.results.comparison import Sample, compare_all, correct

BASELINES = ("mtr", "write", "resolution")
LINE_KEYS = ("policy", "model", "ratio", "reduction", "resolution", "tokens")
METRIC_KEYS = ("images", "top1", "top1_ci", "agreement", "agreement_ci", "kl", "kl_ci")


def main(sweep: Path, out: Path, baselines: Sequence[str] = BASELINES) -> None:
    runs = [read_run(path, path.parent.name) for path in sorted(sweep.glob("*/result.json"))]
    largest = max(runs, key=lambda run: run.result["points"][0]["flops_true"] or 0).result
    lines = [run for run in [*runs, *smaller_models(runs)] if run.result["backbone"] == largest["backbone"]]
    rows, metrics = [], []
    for run in lines:
        assert isinstance(run.sample, Sample), "; ".join(run.notes)
        for point, values in zip(run.result["points"], run.sample.metrics, strict=True):
            if point["policy"] != "none" or not rows:
                rows.append({key: point[key] for key in (*LINE_KEYS, *METRIC_KEYS) if key in point})  # type: ignore[literal-required]
                metrics.append(values)
    for name in baselines:
        pairs = [(a, b) for b, row in enumerate(rows) if (a := baseline_of(row, rows, name)) is not None]
        differences = compare_all(metrics, pairs)
        correct(differences)
        for (_, b), difference in zip(pairs, differences, strict=True):
            rows[b].setdefault("difference", {})[name] = difference
    rows.sort(key=lambda row: (round(row["reduction"], 2), row["kl"]))  # points of one ratio differ by their last token
    record = {key: largest[key] for key in ("task", "backbone", "dataset", "weights", "environment")}  # type: ignore[literal-required]
    best = best_resolution([point for run in lines for point in run.result["points"]])
    table = {"kind": "comparison", **record, "best_resolution": best, "points": rows}
    out.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    print(f"{overview(rows)}\n\n{markdown(rows, baselines)}")
    if best:
        print(f"\n{best}")


def baseline_of(row: dict[str, Any], rows: Sequence[dict[str, Any]], policy: str) -> int | None:
    """The place of the policy's point at the row's ratio; for a row without one, its dearest point of no more FLOPs."""
    if row["policy"] in (policy, "none"):
        return None
    candidates = [i for i, other in enumerate(rows) if other["policy"] == policy and other["ratio"] is not None]
    if row["ratio"] is not None:
        return next((i for i in candidates if rows[i]["ratio"] == row["ratio"]), None)
    cheaper = [i for i in candidates if rows[i]["reduction"] >= row["reduction"]]
    return min(cheaper, key=lambda i: rows[i]["reduction"], default=None)


def overview(rows: Sequence[dict[str, Any]]) -> str:
    """Top-1 in percent and KL of every policy, best first, at every ratio that was asked for."""
    ratios = sorted({row["ratio"] for row in rows if row["ratio"]})
    cells: dict[str, dict[float, str]] = {}
    for row in sorted(rows, key=lambda row: row["kl"]):
        if row["ratio"]:
            size = row.get("resolution", ())
            picture = f" ({size[0]} {'frames' if len(size) == 3 else 'px'})" if size else ""
            shown = f"{100 * row['top1']:.1f} / {row['kl']:.3f}{picture}"
            cells.setdefault(row["policy"], {})[row["ratio"]] = shown
    lines = [
        "| policy | " + " | ".join(f"{100 * ratio:.0f} %" for ratio in ratios) + " |",
        "|---" * len(["", *ratios]) + "|",
    ]
    lines += [f"| `{policy}` | " + " | ".join(at.get(r, "") for r in ratios) + " |" for policy, at in cells.items()]
    return "\n".join(lines)


def markdown(rows: Sequence[dict[str, Any]], baselines: Sequence[str]) -> str:
    """The table; * is p < 0.05 after Holm's correction."""
    heads = ["removed", "policy", "picture", "top-1", "agreement", "KL"]
    heads += [f"{metric} against `{name}`" for name in baselines for metric in ("top-1", "KL")]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [f"{100 * row['reduction']:.1f} %", f"`{row['policy']}`", "×".join(map(str, row.get("resolution", ())))]
        cells += [f"{100 * row[key]:.1f}" for key in ("top1", "agreement")]
        cells += [f"{row['kl']:.3f} ({row['kl_ci'][0]:.3f} – {row['kl_ci'][1]:.3f})"]
        for name in baselines:
            difference = row.get("difference", {}).get(name)
            for metric, scale, digits in (("top1", 100, 1), ("kl", 1, 3)):
                cells.append(signed(difference[metric], scale, digits) if difference else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def signed(difference: dict[str, Any], scale: int, digits: int) -> str:
    value, lo, hi = (f"{scale * number:+.{digits}f}" for number in (difference["difference"], *difference["ci"]))
    return f"{value}{'*' if difference['p_holm'] < 0.05 else ''} ({lo} – {hi})"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or BASELINES)
