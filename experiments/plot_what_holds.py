"""Draw the figures of the report: ``python experiments/plot_what_holds.py LINES FOLDER`` (extra `docs`).

LINES has the JSON files of ``what_holds.py compare``. FOLDER gets loss.png (accuracy lost against FLOPs), kl.png
(change of the output) and standings.png (in how many cells each line is the best, level with the best, worse).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from what_holds import NAMES, accuracy, read

from mtr_lab.report.looks import MATPLOTLIB_MARKERS, look

LINES = {
    "fovea schedule=auto": "fovea, auto",
    "fovea": "fovea",
    "write": "write",
    "adjacent": "adjacent",
    "mtr": "mtr",
    "random": "random pruning",
    "resolution": "smaller picture",
}
SMALLER = "smaller model"
LOST = "{} lost, points"
MOST_LOST = 12
"""Beyond it a model is useless: lines leave the panel."""


def curve(model: dict[str, Any], line: str, metric: str) -> list[tuple[float, float]]:
    """Shares of the FLOPs removed, in percent, and the metric there: as asked for and at the sizes of the picture."""
    lines = [one for one in model["lines"] if one.get("ratio") is not None]
    rows = [one for one in lines if one["line"] == f"{line}, mean"] or [one for one in lines if one["line"] == line]
    return sorted({round(100 * row["reduction"], 1): value(model, row, metric) for row in rows}.items())


def value(model: dict[str, Any], row: dict[str, Any], metric: str) -> float:
    return row["kl"] if metric == "kl" else 100 * (model["lines"][0][metric] - row[metric])


def draw_curves(models: Sequence[dict[str, Any]], metrics: Sequence[str], out: Path) -> None:
    """A panel a model, three in a row: every line of ``LINES``, and the smaller model as a star."""
    rows = -(-len(models) // 3)
    figure, panels = plt.subplots(rows, 3, figsize=(10.8, 3.4 * rows + 0.2), layout="constrained")
    axes = panels.flat[: len(models)]
    for axis in panels.flat[len(models) :]:
        axis.set_axis_off()
    for axis, model, metric in zip(axes, models, metrics, strict=True):
        for line, name in LINES.items():
            points = curve(model, line, metric)
            if points:
                policy, measured = look(line.split(" ")[0]), "schedule=auto" in line
                style = {"color": policy.colour, "marker": MATPLOTLIB_MARKERS[policy.marker]}
                style |= {"ls": "--", "mfc": "white"} if measured else {}
                axis.plot(*zip(*points, strict=True), **style, ms=4, label=name, lw=1.6)
        for row in model["lines"]:
            if row.get("ratio") is None and row["policy"] not in ("none", "resolution") and metric in row:
                point = (100 * row["reduction"], value(model, row, metric))
                axis.plot(*point, "*", color=look("none").colour, ms=11, label=SMALLER)
        axis.axhline(0, color="#444444", lw=0.8, ls=":")
        title = f"{model['backbone']}\n{model['dataset']}, {model['lines'][0]['images']} images"
        axis.set(xlabel="true FLOPs removed, %", title=title)
        axis.set_ylabel("KL to the unreduced model, nats" if metric == "kl" else LOST.format(NAMES[metric]))
        axis.title.set_fontsize(9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(top=min(axis.get_ylim()[1], MOST_LOST) if metric != "kl" else None)
    named = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, frameon=False, loc="outside lower center", ncols=len(named), columnspacing=1.2)
    figure.savefig(out, dpi=120)


def draw_standings(models: Sequence[dict[str, Any]], out: Path) -> None:
    """Bars: the share of cells in which a line is the best, level with the best, worse."""
    groups = {
        "KL, classifiers": [("kl", model) for model in models if "kl" in model["standings"]],
        "accuracy, all models": [(accuracy(model), model) for model in models],
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for axis, (title, cells) in zip(axes, groups.items(), strict=True):
        count: dict[str, list[int]] = {}
        total = 0
        for metric, model in cells:
            for standing in model["standings"][metric].values():
                total += 1
                count.setdefault(standing["best"], [0, 0, 0])[0] += 1
                for line, paired in standing["others"].items():
                    count.setdefault(line, [0, 0, 0])[1 if paired["p_holm"] >= 0.05 else 2] += 1
        order = sorted((line for line in count if sum(count[line]) > 1), key=lambda line: count[line][:2])
        left = [0] * len(order)
        for k, (name, colour) in enumerate(
            (("best", "#1b7837"), ("level with the best", "#a6dba0"), ("worse", "#dddddd"))
        ):
            widths = [count[line][k] for line in order]
            axis.barh(order, widths, left=left, color=colour, label=name)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.set(title=f"{title}: {total} cells", xlabel="cells of a model and a ratio")
        axis.title.set_fontsize(9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(out, dpi=120)


def main(source: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    models = read(source)
    classifiers = [model for model in models if "kl" in model["standings"]]
    draw_curves(models, [accuracy(model) for model in models], folder / "loss.png")
    draw_curves(classifiers, ["kl"] * len(classifiers), folder / "kl.png")
    draw_standings(models, folder / "standings.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
