"""Draw the curves of a training run: ``python experiments/plot_training.py FOLDER [METRICS.csv…]``.

FOLDER/curve.png shows the training loss and the metric on held-out images over the epochs. Several files are drawn one
after the other; the default is ``metrics.csv``.
"""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METRICS = {"val_top1": "top-1", "val_miou": "mIoU", "val_ap50": "AP50"}
NAMES = {"train_loss": "training loss"} | {key: f"held out, {name}" for key, name in METRICS.items()}


def main(folder: Path, files: list[str]) -> None:
    figure, loss = plt.subplots(figsize=(7, 3.2), layout="constrained")
    share = loss.twinx()
    offset, curves = 0, dict[str, list[tuple[int, float]]]()
    for name in files or ["metrics.csv"]:
        rows = list(csv.DictReader((folder / name).open()))
        for row in rows:
            for key in NAMES:
                if row.get(key):
                    curves.setdefault(key, []).append((offset + int(row["epoch"]) + 1, float(row[key])))
        if offset:
            loss.axvline(offset, color="0.8", linewidth=1)
        offset += int(rows[-1]["epoch"]) + 1
    for colour, (key, points) in zip(("C0", "C3"), curves.items(), strict=False):
        axes = loss if key == "train_loss" else share
        axes.plot(*zip(*points, strict=True), color=colour, marker="" if axes is loss else "o", markersize=3)
        axes.set_ylabel(NAMES[key], color=colour)
    loss.set_xlabel("epoch")
    loss.set_ylim(bottom=0)
    share.set_ylim(0, 1)
    share.set_visible(len(curves) > 1)
    figure.savefig(folder / "curve.png", dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
