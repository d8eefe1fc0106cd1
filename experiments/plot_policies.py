"""Draw a comparison of policies: python experiments/plot_policies.py COMPARISON.json OUT.png (extra `docs`)."""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mtr_lab.report.looks import MATPLOTLIB_MARKERS, look

EMPHASISED = ("fovea", "write", "mtr", "resolution", "frames", "random")
ORDER_NOT_RESTORED = ("tome", "famba", "evit", "pumer")  # far outside the scale of the others
PANELS = {"top1": "top-1 accuracy, %", "kl": "KL to the unreduced model, nats"}


def draw(points: list[dict[str, Any]], axis: plt.Axes, metric: str) -> None:
    """Draw one line per policy with its 95 % intervals; emphasised ones are in front; looks are those of reports."""
    policies = dict.fromkeys(point["policy"] for point in points if point["policy"] != "none")
    models = {point["model"] for point in points if "model" in point}
    scale = 100 if metric == "top1" else 1
    for policy in sorted(policies, key=lambda name: name in EMPHASISED):
        rows = sorted((point for point in points if point["policy"] == policy), key=lambda row: row["reduction"])
        x, y = [100 * row["reduction"] for row in rows], [scale * row[metric] for row in rows]
        ends = [[scale * row[f"{metric}_ci"][side] for row in rows] for side in (0, 1)]
        error = [[abs(end - value) for end, value in zip(side, y, strict=True)] for side in ends]
        front = policy in EMPHASISED or policy in models
        colour, marker = look(policy).colour, MATPLOTLIB_MARKERS[look(policy).marker]
        width, size, layer = (2, 6, 3) if front else (0.8, 3, 2)
        axis.errorbar(x, y, error, color=colour, marker=marker, ms=size, lw=width, capsize=2, zorder=layer)
        if front:
            style = {"color": colour, "weight": "bold", "textcoords": "offset points"}
            axis.annotate(name_of(policy), (x[-1], y[-1]), xytext=(6, 0), **style)
    unreduced = next(point for point in points if point["policy"] == "none")
    axis.axhline(scale * unreduced[metric], color="#444444", lw=0.8, ls=":")
    removed = [100 * point["reduction"] for point in points if point["policy"] != "none"]
    room = 0.2 * (max(removed) - min(removed))  # for the names
    axis.set(xlabel="true FLOPs removed, %", ylabel=PANELS[metric], xlim=(min(removed) - 2, max(removed) + room + 2))
    axis.spines[["top", "right"]].set_visible(False)


def name_of(policy: str) -> str:
    """The name in the figure."""
    return {"resolution": "smaller picture", "frames": "fewer frames"}.get(policy, policy)


def main() -> None:
    source, out = map(Path, sys.argv[1:])
    result = json.loads(source.read_text())
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    smaller = [point for point in result["points"] if point["reduction"] >= 0]  # larger pictures: in the title alone
    restored = [point for point in smaller if point["policy"] not in ORDER_NOT_RESTORED]
    for axis, metric in zip(axes, PANELS, strict=True):
        draw(restored, axis, metric)
    models = {point["model"] for point in restored if "model" in point}
    others = sorted({point["policy"] for point in restored} - {"none", *EMPHASISED} - models)
    images = result["points"][0]["images"]
    title = f"{result['backbone']}, {images} images of {result['dataset']}; dotted: unreduced"
    if others:
        title += f"; thin: {', '.join(others)}"
    if result.get("best_resolution"):
        title += f"\n{result['best_resolution']}"
    figure.suptitle(title, fontsize=10)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
