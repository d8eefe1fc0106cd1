"""Draw a comparison of policies: python experiments/plot_policies.py COMPARISON.json OUT.png (extra `docs`)."""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EMPHASISED = {"write": "#d55e00", "mtr": "#0072b2", "random": "#000000"}
OTHERS = "#9a9a9a"
ORDER_NOT_RESTORED = ("tome", "famba", "evit", "pumer")  # far outside the scale of the others
PANELS = {"top1": "top-1 accuracy, %", "kl": "KL to the unreduced model, nats"}


def draw(points: list[dict[str, Any]], axis: plt.Axes, metric: str) -> None:
    """Draw one line a policy with its 95 % intervals; the emphasised policies are coloured and in front."""
    policies = dict.fromkeys(point["policy"] for point in points if point["policy"] != "none")
    scale = 100 if metric == "top1" else 1
    for policy in sorted(policies, key=lambda name: name in EMPHASISED):
        rows = [point for point in points if point["policy"] == policy]
        x, y = [100 * row["reduction"] for row in rows], [scale * row[metric] for row in rows]
        ends = [[scale * row[f"{metric}_ci"][side] for row in rows] for side in (0, 1)]
        error = [[abs(end - value) for end, value in zip(side, y, strict=True)] for side in ends]
        front = policy in EMPHASISED
        colour = EMPHASISED.get(policy, OTHERS)
        axis.errorbar(
            x, y, error, color=colour, marker="o", ms=4, lw=2 if front else 1, capsize=2, zorder=3 if front else 2
        )
        if front:
            axis.annotate(
                policy, (x[-1], y[-1]), xytext=(6, 0), textcoords="offset points", color=colour, weight="bold"
            )
    unreduced = next(point for point in points if point["policy"] == "none")
    axis.axhline(scale * unreduced[metric], color="#444444", lw=0.8, ls=":")
    axis.set(xlabel="true FLOPs removed, %", ylabel=PANELS[metric], xlim=(18, 57))
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    source, out = map(Path, sys.argv[1:])
    result = json.loads(source.read_text())
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    restored = [point for point in result["points"] if point["policy"] not in ORDER_NOT_RESTORED]
    for axis, metric in zip(axes, PANELS, strict=True):
        draw(restored, axis, metric)
    others = sorted({point["policy"] for point in restored} - {"none", *EMPHASISED})
    images = result["points"][0]["images"]
    title = (
        f"{result['backbone']}, {images} images of {result['dataset']}; grey: {', '.join(others)}; dotted: unreduced"
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
