"""Take the run with the better held-out top-1 (mean of the log of loss decides ties) as final/NAME, with its records."""
import csv, json, os, shutil, sys
from pathlib import Path

T, name = Path(os.environ["T"]), sys.argv[1]
best = None
for run in (name, f"{name}_tuned"):
    folder = T / "runs" / run
    if not (folder / "training.json").exists():
        continue
    rows = [row for row in csv.DictReader((folder / "metrics.csv").open()) if row.get("val_top1")]
    last = rows[-1] if rows else {"val_top1": 0, "val_loss": 9}
    score = (round(float(last["val_top1"]), 6), -float(last["val_loss"]))
    print(run, score)
    if best is None or score >= best[0]:
        best = score, folder
if best is None:
    sys.exit("no run")
(T / "final").mkdir(exist_ok=True)
to = T / "final" / name
shutil.rmtree(to, ignore_errors=True)
to.mkdir()
for file in ("model.safetensors", "training.json", "metrics.csv", "curve.svg"):
    shutil.copy(best[1] / file, to / file)
print("chosen:", best[1].name)
(to / "chosen").write_text(best[1].name + "\n")
