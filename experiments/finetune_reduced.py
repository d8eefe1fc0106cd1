"""Does a model that is fine-tuned with fewer tokens lose less by reducing? The bundled vim_nano on Imagenette.

    python experiments/finetune_reduced.py train DIR RUNS [OVERRIDE…]    # on a GPU; DIR/train: 9 469 images, 128 x 128
    python experiments/finetune_reduced.py compare DIR RUNS OUT.json     # on a CPU; DIR/val: 3 000 images

Two fine-tunings of the same length: under MTR at 40 %, and unreduced, which tells what longer training alone gives.
Then the two and the bundled model, reduced without training, on the validation images at every ratio. Prints a table in
Markdown; differences of top-1 to the bundled model at the same ratio are paired over images (bootstrap, 10 000
resamples, seed 0).
"""

import json
import subprocess
import sys
from pathlib import Path

from mtr_lab.results.comparison import compare
from mtr_lab.results.predictions_file import load_predictions
from mtr_lab.results.schema import read_result

FINE_TUNINGS = {"reduced": ["mtr.ratio=0.4"], "unreduced": ["mtr.ratio=0"]}
NAMES = {"bundled": "training-free", "unreduced": "fine-tuned unreduced", "reduced": "fine-tuned under MTR at 40 %"}
RATIOS = "[0.2,0.3,0.4,0.5]"


def train(data: Path, runs: Path, overrides: list[str]) -> None:
    for name, own in FINE_TUNINGS.items():
        program = [sys.executable, "-m", "mtr_lab.train", "experiment=vim_nano_reduced", f"dataset.root={data}"]
        subprocess.run([*program, *own, f"hydra.run.dir={runs / name}", *overrides], check=True)


def compare_all(data: Path, runs: Path, out: Path) -> None:
    for name in NAMES:
        program = [sys.executable, "-m", "mtr_lab", "dataset=imagenette", f"dataset.root={data}", f"mtr.ratio={RATIOS}"]
        weights = [] if name == "bundled" else [f"backbone.checkpoint={(runs / name / 'model.safetensors').absolute()}"]
        folder = runs / f"{name}_evaluated"
        subprocess.run([*program, *weights, "timing.batch_size=0", f"hydra.run.dir={folder}"], check=True)
    results = {name: read_result(runs / f"{name}_evaluated") for name in NAMES}
    predictions = {name: load_predictions(runs / f"{name}_evaluated") for name in NAMES}
    rows = [
        {
            "model": name,
            **{key: point[key] for key in ("ratio", "reduction", "images", "top1", "top1_ci", "kl")},
            "difference": compare(predictions["bundled"], i, predictions[name], i)["top1"],
        }
        for name, result in results.items()
        for i, point in enumerate(result["points"])
    ]
    weights = {name: result["weights"] for name, result in results.items()}
    out.write_text(json.dumps({"weights": weights, "points": rows}, indent=1) + "\n")
    print("| removed | model | top-1 | against training-free |")
    print("|---|---|---|---|")
    for row in sorted(rows, key=lambda row: row["ratio"]):
        difference = row["difference"]
        cells = [f"{100 * row['reduction']:.1f} %", NAMES[row["model"]], f"{100 * row['top1']:.1f}"]
        low, high = (100 * end for end in difference["ci"])
        cells.append(
            f"{100 * difference['difference']:+.1f} ({low:+.1f} – {high:+.1f})" if row["model"] != "bundled" else ""
        )
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    command, data, runs, *rest = sys.argv[1:]
    if command == "train":
        train(Path(data), Path(runs), rest)
    else:
        compare_all(Path(data), Path(runs), Path(rest[0]))
