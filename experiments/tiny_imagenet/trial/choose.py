"""Copies the run with the better held-out top-1 at 64² (both in bfloat16) to final/."""
import csv, json, os, shutil, time
from pathlib import Path

T = Path(os.environ["T"])
runs = [name for name in "ab" if (T / "runs" / name / "model.safetensors").exists()]
scores = {}
for _ in range(20):  # of A, the evaluation may still run
    if (T / "runs/a_held/result.json").exists() or "a" not in runs:
        break
    time.sleep(0.5)
try:
    scores["a"] = json.loads((T / "runs/a_held/result.json").read_text())["points"][0]["top1"]
except Exception as error:
    print("a:", error)
try:
    scores["b"] = [float(row["val_top1"]) for row in csv.DictReader((T / "runs/b/metrics.csv").open()) if row.get("val_top1")][-1]
except Exception as error:
    print("b:", error)
scores = {name: value for name, value in scores.items() if name in runs}
best = max(scores, key=lambda name: (round(scores[name], 6), name)) if len(scores) == 2 else runs[-1] if runs else None
to, part = T / "final", T / "final.part"
shutil.rmtree(part, ignore_errors=True)
part.mkdir()
if best:
    for path in (T / "runs" / best).iterdir():
        if path.suffix in (".safetensors", ".json", ".csv", ".svg"):
            shutil.copy(path, part / path.name)
else:
    shutil.copy(Path(os.environ["OUT_T"]) / "vim_ti_64.safetensors", part / "model.safetensors")
(part / "chosen").write_text(f"{best} of {scores}\n")
shutil.rmtree(to, ignore_errors=True)
part.rename(to)
