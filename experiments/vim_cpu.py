"""Vim-Ti on a CPU at 224²: against its matrix products, timm's DeiT-Ti, reduced, in bfloat16 and with int8 weights.

    python experiments/vim_cpu.py [THREADS …]

Runs all models in turn and takes the least time of each, by default on one thread, then on two. Ratios on one thread
follow from the time of the processor, since other programs disturb it little; on several threads, which wait for each
other, from the time of the clock: run them on a machine without other programs. Page faults of a pass tell whether its
tensors got new memory from the operating system, which depends on the state of the heap. Prints tables, writes
results/vim_cpu.json; takes 2 to 10 minutes.
"""

import copy
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from families_cpu import Products, reference_scan
from torch import Tensor, nn

import mtr_lab
from mtr_lab import ops
from mtr_lab.results.atomic import replace_file
from mtr_lab.results.environment import describe_environment

ROUNDS = {8: 12, 1: 30}
RATIO = 0.4
DEPTH, TOKENS, CHANNELS, STATES = 24, 197, 384, 16
LINES = [  # (line, numerator, denominator, target, whether less is better), of 8 images and of one
    ("share of PyTorch's products", "PyTorch's products", "vim_ti", 0.65, False),
    ("share of oneDNN's products", "oneDNN's products", "vim_ti", 0.65, False),
    ("against DeiT-Ti", "vim_ti", "deit_ti", 1.5, True),
    ("fovea 0.4 against DeiT-Ti", "fovea", "deit_ti", 1.0, True),
    ("mtr 0.4, times as fast", "vim_ti", "mtr", {8: 1.5, 1: 1.3}, False),
    ("fovea 0.4, times as fast", "vim_ti", "fovea", None, False),
    ("scans against oneDNN's products", "scans", "oneDNN's products", 1 / 3, True),
    ("scans against PyTorch's products", "scans", "PyTorch's products", 1 / 3, True),
    ("scans against mamba-ssm's reference", "reference scans", "scans", None, False),
    ("bfloat16, times as fast", "vim_ti", "bfloat16", 1.4, False),
    ("bfloat16 against DeiT-Ti's", "bfloat16", "deit_ti bfloat16", None, True),
    ("int8 projections, times as fast", "vim_ti", "int8", 1.0, False),
]


def int8(model: nn.Module) -> nn.Module:
    """A copy whose input and output projections have int8 weights, and quantise their inputs at every call."""
    quantised = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch will move its quantisation to another package
        for block in quantised.blocks:  # type: ignore[union-attr]
            for name in ("in_proj", "out_proj"):
                layer = nn.Sequential(copy.deepcopy(getattr(block.mixer, name)))
                torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, inplace=True)
                setattr(block.mixer, name, layer[0])
    return quantised


def scan_inputs(batch: int) -> dict[str, Any]:
    torch.manual_seed(0)
    u, delta = torch.randn(2, 2, batch, TOKENS, CHANNELS)
    B, C = torch.randn(2, 2, batch, TOKENS, STATES)
    A = -torch.arange(1.0, STATES + 1).expand(2, CHANNELS, -1).contiguous()
    return {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": torch.ones(2, CHANNELS)}


def contestants(batch: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by its name."""
    torch.manual_seed(0)
    images, model = torch.randn(batch, 3, 224, 224), mtr_lab.create_model("vim_ti").eval()
    deit, halved, recorded = timm.create_model("deit_tiny_patch16_224").eval(), images.bfloat16(), Products()
    reduced = {policy: mtr_lab.create_model("vim_ti").eval() for policy in ("mtr", "fovea")}
    for policy, other in reduced.items():
        mtr_lab.patch(other, policy, ratio=RATIO)
    models = {"vim_ti": model, "deit_ti": deit, **reduced, "int8": int8(model)}
    half = {"bfloat16": copy.deepcopy(model).bfloat16(), "deit_ti bfloat16": copy.deepcopy(deit).bfloat16()}
    with torch.inference_mode(False), torch.no_grad(), ops.use_backend("reference"), recorded:
        model(images.clone())
    inputs, bias = scan_inputs(batch), torch.zeros(2, CHANNELS)
    first = [{name: t[g].mT.contiguous() if t.ndim == 4 else t[g] for name, t in inputs.items()} for g in range(2)]

    def scan() -> Tensor:
        return ops.selective_scan(**inputs, delta_bias=bias, reverse=[False, True])[0]

    def reference() -> None:
        for g in range(2):
            reference_scan(**first[g], bias=bias[g])

    runs: dict[str, Callable[[], Any]] = {name: lambda m=m: m(images) for name, m in models.items()}
    runs |= {name: lambda m=m: m(halved) for name, m in half.items()}
    runs |= {"PyTorch's products": recorded.run, "oneDNN's products": recorded.run_onednn}
    return runs | {"scans": scan, "reference scans": reference}


def least(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Of each the least milliseconds of the processor and of the clock, scans for all blocks, and page faults."""
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            if name == "reference scans" and number > 2:
                continue
            before = state()
            run()
            cpu, wall, faults = (after - first for after, first in zip(state(), before, strict=True))
            blocks = 1e3 * (DEPTH if "scans" in name else 1)
            times[name].append((blocks * cpu, blocks * wall, faults))
    names = "cpu_ms", "wall_ms", "page_faults"
    return {
        name: dict(zip(names, map(min, zip(*values[1:], strict=True)), strict=True)) for name, values in times.items()
    }


def state() -> tuple[float, ...]:
    """Seconds of the processor and of the clock, page faults, so far."""
    return time.process_time(), time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure(threads: int) -> dict[str, Any]:
    """Times and ratios for 8 images and for one, printed and returned."""
    torch.set_num_threads(threads)
    clock, times = "cpu_ms" if threads == 1 else "wall_ms", {}
    before = os.getloadavg()
    for batch, rounds in ROUNDS.items():
        times[batch] = least(contestants(batch), rounds)
        print(f"batch {batch}: milliseconds of the processor and of the clock, page faults; threads: {threads}")
        for name, t in times[batch].items():
            print(f"  {name:24s}{t['cpu_ms']:9.1f}{t['wall_ms']:9.1f}{t['page_faults']:9.0f}")
    lines = []
    print(f"\n{'line':38s}{'target':>9s}{'batch 8':>9s}{'batch 1':>9s}")
    for line, above, below, target, less in LINES:
        ratios = {batch: t[above][clock] / t[below][clock] for batch, t in times.items()}
        aims = target if isinstance(target, dict) else dict.fromkeys(ratios, target)
        lines.append({"line": line, "target": aims, "less_is_better": less, "measured": ratios})
        sign = "" if target is None else ("≤ " if less else "≥ ") + "/".join(f"{a:.2f}" for a in {*aims.values()})
        print(f"{line:38s}{sign:>9s}{ratios[8]:9.2f}{ratios[1]:9.2f}")
    load = {"before": before, "after": os.getloadavg()}
    print(f"\nload {load['before'][0]:.1f} before, {load['after'][0]:.1f} after\n", flush=True)
    return {"load": load, "ratios_of": clock, "times": times, "lines": lines}


@torch.inference_mode()
def main() -> None:
    """Measure, print, write."""
    threads = {number: measure(number) for number in map(int, sys.argv[1:] or ("1", "2"))}
    machine = describe_environment()
    environment = {key: machine[key] for key in ("cpu", "python", "torch", "commit")}
    result = {"environment": environment, "ratio": RATIO, "threads": threads}
    with replace_file(Path(__file__).parent / "results" / "vim_cpu.json") as stream:
        stream.write(json.dumps(result, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
