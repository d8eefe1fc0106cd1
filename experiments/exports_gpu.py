"""Files for PyTorch (.pt2) on a GPU, run without this library, beside the model on the same device.

    python experiments/exports_gpu.py OUT.json [--ratios 0 0.3 0.4] [--precisions float32 float16] [--compile]

The bundled model is exported on the CPU, once as ``mtr_lab.export_model`` does and once with the plans of its blocks as
further outputs. A process that cannot import mtr_lab moves each file to the GPU and runs the bundled pictures through
it, in batches of several sizes. Its logits are compared with the model's, which decides by itself or follows the
file's plans, with its kernels or in the file's operations. With ``--compile`` AOTInductor compiles the file for the
GPU, too. ``--device cpu`` does the same on a CPU; ``--calls 0`` measures no times.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mtr_lab
from mtr_lab.data.pictures import prepare, sample_pictures
from mtr_lab.export.deployable import Deployable, describe, forced_plans, recorded_plans
from mtr_lab.export.tracing import exported_program
from mtr_lab.measure.speed import call_ms
from mtr_lab.results.environment import describe_environment

BATCHES = (1, 7, 64)
"""Numbers of images in a call: the first two once, the last for the rest; all three are timed."""

ALONE = """
import json, sys, time
import torch, torch.export.passes
sys.modules["mtr_lab"] = None  # its import fails even where it is installed
kind, file, images, out, counts, sizes, device, calls = sys.argv[1:]
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
with torch.no_grad():
    results = [run(part) for part in images.split(json.loads(counts))]
    results = [[t.cpu() for t in ((r,) if isinstance(r, torch.Tensor) else r)] for r in results]
    ready, ms = time.perf_counter() - start, {}
    for size in sizes if int(calls) else ():
        times = []
        for _ in range(int(calls)):
            wait()
            start = time.perf_counter()
            run(images[:size])
            wait()
            times.append(1e3 * (time.perf_counter() - start))
        ms[size] = sorted(times)[len(times) // 2]
torch.save(results, out)
print(json.dumps({"ms": ms, "first_pass_s": ready}))
"""
"""Moves, compiles or runs a file. Its arguments: what to do, the file, the images, the output, the sizes of the
batches, those to time, the device, how often to time."""


def counts(images: int) -> list[int]:
    """The sizes of the batches."""
    sizes = [*BATCHES[:2]]
    while sum(sizes) < images:
        sizes.append(min(BATCHES[2], images - sum(sizes)))
    return sizes


def export(model: Any, images: Tensor, folder: Path, precision: str) -> dict[str, Path]:
    """Write the two files: ``program`` as users get it, ``plans`` with the plans as further outputs."""
    files = {name: folder / f"{name}.pt2" for name in ("program", "plans")}
    mtr_lab.export_model(model, files["program"], precision=precision, name="vim_nano")
    traced = Deployable(copy.deepcopy(model).to(getattr(torch, precision)), plans=True)
    torch.export.save(exported_program(traced, images[:3], dynamic=True), files["plans"])
    return files


def alone(kind: str, file: Path, images: Path, number: int, out: Path, device: torch.device, calls: int) -> Any:
    """What a process says that cannot import this library: ``-I`` ignores PYTHONPATH and the current folder."""
    arguments = [kind, str(file), str(images), str(out), json.dumps(counts(number)), json.dumps(BATCHES), device.type]
    command = [sys.executable, "-I", "-c", ALONE, *arguments, str(calls)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {"failed": done.stderr[-1500:]}


def compared(logits: Tensor, expected: Tensor) -> dict[str, float]:
    """Differences relative to the largest output, and the share of pictures of the same class."""
    error = (logits - expected).abs().amax(1) / expected.abs().max().clamp(min=1)
    same = (logits.argmax(1) == expected.argmax(1)).float().mean()
    return {"max": float(error.max()), "median": float(error.median()), "agreement": float(same)}


@torch.no_grad()
def of_the_model(model: Any, images: Tensor, backend: str, outputs: list[list[Tensor]] | None) -> Tensor:
    """The model's logits; with ``outputs`` of the file with plans, for each batch, it follows these plans."""
    logits = []
    with mtr_lab.ops.use_backend(backend):
        for i, batch in enumerate(images.split(counts(len(images)))):
            with recorded_plans(model) as plans:
                result = model(batch)
            if outputs and plans:
                with forced_plans(model, [t.to(images.device) for t in outputs[i][1:]], plans):
                    result = model(batch)
            logits.append(result.float().cpu())
    return torch.cat(logits)


@torch.no_grad()
def times(model: Any, images: Tensor, calls: int) -> dict[str, dict[int, float]]:
    """Milliseconds of the model, on a GPU of a graph, too."""
    runs, ms = {"eager": model}, {}
    if images.is_cuda:
        runs["graph"] = mtr_lab.compile(model)
    for name, run in runs.items():
        parts = {size: partial(run, images[:size]) for size in BATCHES}
        for call in parts.values():
            call()
        ms[name] = {
            size: statistics.median(call_ms(call, images.device) for _ in range(calls)) for size, call in parts.items()
        }
    return ms


def main() -> None:
    """Export, run, compare; write after every file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.0, 0.3, 0.4])
    parser.add_argument("--precisions", nargs="+", default=["float32", "float16"])
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--calls", type=int, default=9)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    results: dict[str, Any] = {"environment": describe_environment(), "pictures": given.pictures, "files": {}}
    for precision in given.precisions:
        for ratio in given.ratios:
            with tempfile.TemporaryDirectory() as name:
                results["files"][f"{precision} {ratio}"] = row = measured(given, precision, ratio, Path(name))
            print(f"{precision} {ratio}", json.dumps(row), flush=True)
            given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measured(given: argparse.Namespace, precision: str, ratio: float, folder: Path) -> dict[str, Any]:
    """The figures of one model in one precision."""
    model = mtr_lab.create_model("vim_nano", pretrained=True).eval()
    config = describe(model, "classification", "vim_nano", precision, None).data_config
    images = torch.stack([prepare(picture, config) for picture in sample_pictures(given.pictures)])
    torch.save(images, folder / "images.pt")
    if ratio:
        mtr_lab.patch(model, "mtr", ratio=ratio)
    files, row = export(model, images, folder, precision), {}
    common = {"images": folder / "images.pt", "number": len(images), "device": given.device, "calls": given.calls}
    if given.compile:
        files["package"] = folder / "package.pt2"
        row["compilation"] = alone("compile", files["program"], out=files["package"], **common)
    outputs: dict[str, Any] = {}
    for kind, file in files.items():
        saved = folder / f"{kind}.pt"
        row[kind] = alone(kind, file, out=saved, **common) if file.exists() else {"failed": "there is no file"}
        outputs[kind] = torch.load(saved, weights_only=True) if saved.exists() else None
    placed = {"device": given.device, "dtype": getattr(torch, precision)}
    model, images = model.to(**placed), images.to(**placed)
    for backend in ("auto", "portable"):
        own = of_the_model(model, images, backend, None)
        for kind, parts in outputs.items():
            if parts is not None:
                row[kind][f"from_{backend}"] = compared(torch.cat([part[0] for part in parts]), own)
        if outputs["plans"] is not None and ratio:
            follows = of_the_model(model, images, backend, outputs["plans"])
            logits = torch.cat([part[0] for part in outputs["plans"]])
            row["plans"][f"from_{backend}_with_the_same_plans"] = compared(logits, follows)
    return row | ({"model_ms": times(model, images, given.calls)} if given.calls else {})


if __name__ == "__main__":
    main()
