"""Every family on a GPU: times and true FLOPs, beside Vim of about equal FLOPs, and the kernels of a pass.

    python experiments/families_gpu.py OUT.json [--tables FOLDER] [--models NAME …] [--batch 128] [--ratios 0 0.3]

Random weights, the models' own image size, float16, CUDA graphs, unreduced or by MTR at ``--ratios``. The models take
turns, so that a slow moment slows all of them. With ``--tables`` a text file for each model lists its kernels by their
total time, as the profiler sees a replay. With ``--device cpu`` the models run in float32, without graphs.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import mtr_lab
from mtr_lab.measure.flops import TRUE, model_flops
from mtr_lab.measure.speed import idle_and_stream_ms
from mtr_lab.results.environment import describe_environment

YARDSTICKS = {
    "vim_ti": "vim_ti",
    "vim_s": "vim_s",
    "plainmamba_l1": "vim_ti",
    "vmamba_t": "vim_s",
    "mambavision_t": "vim_s",
}
"""By model: the Vim whose FLOPs per second are the measure of it."""
ROUNDS = 15


def pass_of(name: str, batch: int, ratio: float, device: torch.device) -> tuple[Any, Callable[[], Tensor]]:
    """A model with random weights, reduced by MTR, and a call of it; on a GPU the replay of a graph."""
    torch.manual_seed(0)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = mtr_lab.create_model(name).eval().to(device, dtype)
    if ratio:
        mtr_lab.patch(model, "mtr", ratio=ratio)
    images = torch.randn(batch, *model.input_shape, device=device, dtype=dtype)
    run = mtr_lab.compile(model) if device.type == "cuda" else model
    run(images)
    return model, lambda: run(images)


def flops(model: Any) -> int:
    """True FLOPs of one image, those of a reduction included."""
    active = model.reduction
    return (
        model_flops(model, convention=TRUE)
        if active is None
        else active.schedule.flops + active.schedule.flops_overhead
    )


def table(run: Callable[[], Tensor], device: torch.device) -> str:
    """The kernels of a call, on a CPU its operators: microseconds in all, number of launches, name."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    rows = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count, event.key)
        for event in profiled.key_averages()
    ]
    rows = sorted((row for row in rows if row[0]), reverse=True)
    lines = [f"{time:10.1f} {count:5d}  {name[:150]}" for time, count, name in rows]
    return "\n".join([f"{sum(row[0] for row in rows):10.1f} {sum(row[1] for row in rows):5d}  in all", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tables", type=Path)
    parser.add_argument("--models", nargs="+", default=[*YARDSTICKS])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    arguments = parser.parse_args()
    device, runs, rows = arguments.device, {}, {}
    times: dict[str, list[float]] = {}
    with torch.no_grad():
        for model_name, ratio in product(arguments.models, arguments.ratios):
            name = f"{model_name} {ratio}" if ratio else model_name
            model, runs[name] = pass_of(model_name, arguments.batch, ratio, device)
            rows[name] = {"batch": arguments.batch, "gflops": flops(model) / 1e9}
        for _ in range(ROUNDS if device.type == "cuda" else 2):
            for name, run in runs.items():
                times.setdefault(name, []).append(idle_and_stream_ms(run, device)[1])
        for name, run in runs.items():
            if arguments.tables:
                arguments.tables.mkdir(parents=True, exist_ok=True)
                (arguments.tables / f"{name}.txt").write_text(table(run, device), encoding="utf-8")
    for name, row in rows.items():
        ms = statistics.median(times[name])
        row |= {"ms": ms, "ms_min": min(times[name]), "ms_max": max(times[name])}
        row |= {"img_per_s": 1e3 * row["batch"] / ms, "tflops_per_s": row["gflops"] * row["batch"] / ms}
    for name, row in rows.items():
        other = rows.get(YARDSTICKS.get(name.split()[0], ""))
        if other:
            row["times_as_long_as_vim"] = other["tflops_per_s"] / row["tflops_per_s"]
        print(name, json.dumps(row), flush=True)
    result = {"environment": describe_environment(), "models": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
