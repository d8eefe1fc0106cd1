"""Files for PyTorch (.pt2) on a GPU, run without this library, beside the model on the same device.

    python experiments/exports_gpu.py OUT.json [--ratios 0 0.3 0.4] [--precisions float32 float16] [--compile]

The bundled model is exported by ``mtr-lab export``, on the CPU. A process that cannot import mtr_lab moves each file to
the GPU and runs the bundled pictures through it, in batches of several sizes. Its logits are compared with the model's.
With ``--compile`` AOTInductor compiles each file for the GPU, too. ``--device cpu`` does the same on a CPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mtr_lab
from mtr_lab.data.pictures import prepare, sample_pictures
from mtr_lab.export.deployable import describe
from mtr_lab.measure.speed import call_ms
from mtr_lab.results.environment import describe_environment

BATCHES = (1, 7, 64)
"""Numbers of images in a call: the first two once, the last for the rest; all three are timed."""
CALLS = 9

ALONE = """
import json, sys, time
import torch, torch.export.passes
sys.modules["mtr_lab"] = None  # importing it fails
kind, file, images, out, sizes, device, calls = sys.argv[1:]
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
images, sizes = torch.load(images, weights_only=True).to(device), json.loads(sizes)
wait = torch.cuda.synchronize if device == "cuda" else lambda: None
start = time.perf_counter()
if kind == "package":
    run = torch._inductor.aoti_load_package(file)
else:
    program = torch.export.passes.move_to_device_pass(torch.export.load(file), device)
    assert not any("mtr_lab" in str(node.target) for node in program.graph.nodes)
    if kind == "compile":
        torch._inductor.aoti_compile_and_package(program, package_path=out)
        print(json.dumps({"seconds": time.perf_counter() - start}))
        sys.exit()
    run = program.module()
first = lambda given: result[0] if isinstance(result := run(given), (tuple, list)) else result
with torch.no_grad():
    counts = [*sizes[:2]]
    while sum(counts) < len(images):
        counts.append(min(sizes[2], len(images) - sum(counts)))
    logits = torch.cat([first(part).float().cpu() for part in images.split(counts)])
    ready, ms = time.perf_counter() - start, {}
    for size in sizes:
        times = []
        for _ in range(int(calls)):
            wait()
            start = time.perf_counter()
            first(images[:size])
            wait()
            times.append(1e3 * (time.perf_counter() - start))
        ms[size] = sorted(times)[len(times) // 2]
torch.save(logits, out)
print(json.dumps({"ms": ms, "first_pass_s": ready}))
"""
"""Moves, compiles or runs a file. Its arguments: what to do, the file, images, output, batches, device, calls."""


def export(folder: Path, ratio: float, precision: str) -> Path | None:
    """Run ``mtr-lab export``; the file, ``None`` if there is none."""
    overrides = ["format=pt2", f"precision={precision}", f"mtr.ratio={ratio}", f"hydra.run.dir={folder}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-m", "mtr_lab.export", *overrides], env=environment, check=False)
    return next(folder.rglob("*.pt2"), None)


def alone(kind: str, file: Path, images: Path, out: Path, device: torch.device) -> dict[str, Any]:
    """What a process says that cannot import this library: ``-I`` ignores PYTHONPATH and the current folder."""
    arguments = [kind, str(file), str(images), str(out), json.dumps(BATCHES), device.type, str(CALLS)]
    command = [sys.executable, "-I", "-c", ALONE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent, check=False)
    if done.returncode:
        return {"failed": done.stderr[-1500:]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def compared(logits: Tensor, expected: Tensor) -> dict[str, float]:
    """Differences relative to the largest output, and the share of pictures of the same class."""
    error = (logits - expected).abs().amax(1) / expected.abs().max().clamp(min=1)
    same = (logits.argmax(1) == expected.argmax(1)).float().mean()
    return {"max": float(error.max()), "median": float(error.median()), "agreement": float(same)}


@torch.no_grad()
def of_the_model(model: Any, images: Tensor) -> tuple[dict[str, Tensor], dict[str, dict[int, float]]]:
    """The model's logits by its kernels and in the file's operations, and milliseconds, on a GPU of a graph, too."""
    runs: dict[str, Callable[[Tensor], Tensor]] = {"eager": model}
    if images.is_cuda:
        runs["graph"] = mtr_lab.compile(model)
    logits, ms = {}, {}
    parts = images.split(BATCHES[-1])
    for backend in ("auto", "portable"):
        with mtr_lab.ops.use_backend(backend):
            logits[backend] = torch.cat([model(part).float().cpu() for part in parts])
    for name, run in runs.items():
        calls = {size: partial(run, images[:size]) for size in BATCHES}
        for call in calls.values():
            call()
        ms[name] = {
            size: statistics.median(call_ms(call, images.device) for _ in range(CALLS)) for size, call in calls.items()
        }
    return logits, ms


def main() -> None:
    """Export, run, compare; write after every file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.0, 0.3, 0.4])
    parser.add_argument("--precisions", nargs="+", default=["float32", "float16"])
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    results: dict[str, Any] = {"environment": describe_environment(), "pictures": given.pictures, "files": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for precision in given.precisions:
            for ratio in given.ratios:
                model = mtr_lab.create_model("vim_nano", pretrained=True).eval()
                config = describe(model, "classification", "vim_nano", precision, None).data_config
                images = torch.stack([prepare(picture, config) for picture in sample_pictures(given.pictures)])
                torch.save(images, folder / "images.pt")
                if ratio:
                    mtr_lab.patch(model, "mtr", ratio=ratio)
                placed = {"device": given.device, "dtype": getattr(torch, precision)}
                logits, ms = of_the_model(model.to(**placed), images.to(**placed))
                row: dict[str, Any] = {"model_ms": ms, "portable": compared(logits["portable"], logits["auto"])}
                results["files"][f"{precision} {ratio}"] = row
                file = export(folder / f"{precision}-{ratio}", ratio, precision)
                call = partial(alone, images=folder / "images.pt", device=given.device)
                files = {} if file is None else {"program": file}
                if file is not None and given.compile:
                    files["package"] = file.with_suffix(".package.pt2")
                    row["compilation"] = call("compile", file, out=files["package"])
                for kind, path in files.items():
                    saved = folder / f"{precision}-{ratio}-{kind}.pt"
                    row[kind] = call(kind, path, out=saved) if path.exists() else {"failed": "there is no file"}
                    if saved.exists():
                        found = torch.load(saved, weights_only=True)
                        row[kind] |= {f"from_{how}": compared(found, right) for how, right in logits.items()}
                print(f"{precision} {ratio}", json.dumps(row), flush=True)
                given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
