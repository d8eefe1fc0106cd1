"""Every 20 s (or `once`): the newest averaged weights in half precision, one archive of the logs and results, to OUT_T.

`keep.py RUN`: RUN/last.ckpt's average as RUN/model.safetensors.
"""
import json, os, sys, tarfile, time, traceback
from pathlib import Path

import torch
from safetensors.torch import save_file

T, OUT = Path(os.environ["T"]), Path(os.environ["OUT_T"])
seen = {}

def average(checkpoint: Path, to: Path) -> str:
    state = torch.load(checkpoint, "cpu", weights_only=True)
    values = {k.removeprefix("model."): v for k, v in state["state_dict"].items() if k.startswith("model.")}
    names = json.dumps(sorted(p.name for p in (T / "data/train").iterdir()))
    part = to.with_name(f".{to.name}.part")
    save_file({k: v.half().contiguous() if v.is_floating_point() else v for k, v in values.items()}, part, {"label_names": names})
    part.rename(to)
    return f"{checkpoint} after epoch {state['epoch'] + 1} of {state['settings']['training.epochs']}"

def weights() -> None:
    to, part = OUT / "vim_ti_64.safetensors", OUT / ".part"
    sources = [T / "final/model.safetensors", T / "runs/b/model.safetensors", T / "runs/a/model.safetensors"]
    finished = next((path for path in sources if path.exists()), None)
    source = finished or T / "runs/a/last.ckpt"
    if not source.exists() or seen.get("weights") == (source, source.stat().st_mtime):
        return
    seen["weights"] = source, source.stat().st_mtime
    if finished:
        part.write_bytes(source.read_bytes())
        part.rename(to)
        note = str(source)
    else:
        note = average(source, to)
    (OUT / "vim_ti_64.source").write_text(note + "\n")

def logs() -> None:
    part = OUT / ".logs.part"
    with tarfile.open(part, "w:xz", preset=1) as archive:
        for pattern in ("logs/*", "state", "start", "teacher/*.json", "runs/*/*.csv", "runs/*/*.json", "runs/*/*.svg", "final/*.json", "final/*.csv", "final/*.svg", "final/chosen", "eval/logs/*", "eval/sweep/*/*/result.json"):
            for path in sorted(T.glob(pattern)):
                if path.is_file():
                    archive.add(path, path.relative_to(T))
    part.rename(OUT / "logs.tar.xz")

def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] != "once":
        print(average(Path(sys.argv[1]) / "last.ckpt", Path(sys.argv[1]) / "model.safetensors"))
        return
    while True:
        for step in (weights, logs):
            try:
                step()
            except Exception:
                traceback.print_exc()
        if sys.argv[1:] == ["once"]:
            return
        time.sleep(20)

main()
