"""Every 75 s (or `once`): the newest weights in half precision, and one archive of the logs, to OUT_T."""
import os, sys, tarfile, time, traceback
from pathlib import Path

import torch
from safetensors.torch import save_file

T, OUT = Path(os.environ["T"]), Path(os.environ["OUT_T"])

def weights(name: str) -> None:
    to, part = OUT / f"{name}.safetensors", OUT / f".{name}.part"
    for folder in (T / "final" / name, T / "runs" / f"{name}_tuned", T / "runs" / name):
        if (folder / "model.safetensors").exists():
            part.write_bytes((folder / "model.safetensors").read_bytes())
            part.rename(to)
            (OUT / f"{name}.source").write_text(f"{folder}\n")
            return
    checkpoint = T / "runs" / name / "last.ckpt"
    if checkpoint.exists():
        state = torch.load(checkpoint, "cpu", weights_only=True)
        average = {k.removeprefix("model."): v for k, v in state["state_dict"].items() if k.startswith("model.")}
        save_file({k: v.half().contiguous() if v.is_floating_point() else v for k, v in average.items()}, part)
        part.rename(to)
        (OUT / f"{name}.source").write_text(f"{checkpoint} after epoch {state['epoch'] + 1}\n")

def logs() -> None:
    part = OUT / ".logs.part"
    with tarfile.open(part, "w:xz", preset=3) as archive:
        for pattern in ("logs/*", "state", "teacher/*.json", "runs/*/*.csv", "runs/*/*.json", "runs/*/*.svg", "runs/*/predictions*", "final/*/*.json", "final/*/*.csv", "final/*/*.svg", "final/*/chosen", "probe/run/*.csv"):
            for path in sorted(T.glob(pattern)):
                if path.is_file():
                    archive.add(path, path.relative_to(T))
        for path in OUT.glob("*.source"):
            archive.add(path, path.name)
    part.rename(OUT / "logs.tar.xz")

def main() -> None:
    while True:
        for step in (lambda: weights("vim_ti_64"), lambda: weights("vim_ti_64_half"), logs):
            try:
                step()
            except Exception:
                traceback.print_exc()
        if sys.argv[1:] == ["once"]:
            return
        time.sleep(75)

main()
