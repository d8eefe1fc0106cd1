"""Times of the Triton kernels of one Vision Mamba block, against the bounds of the hardware.

    python experiments/kernels_gpu.py OUT.json

Needs a GPU. A bound is the memory traffic or arithmetic of a kernel over the peak rate measured in the same run.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from triton.testing import do_bench_cudagraph

from mtr_lab import ops
from mtr_lab.measure.roofline import Peaks, measure_peaks
from mtr_lab.ops.gpu import decision, norm, project, scan, scan_backward
from mtr_lab.ops.scan_inputs import ScanInputs
from mtr_lab.results.atomic import replace_file
from mtr_lab.results.environment import describe_environment

SHAPES = {  # images, tokens, d_inner, dt rank
    "vim_ti, batch 256": (256, 197, 384, 12),
    "vim_s, batch 256": (256, 197, 768, 24),
    "vim_b, batch 256": (256, 197, 1536, 48),
    "vim_s, batch 1": (1, 197, 768, 24),
    "vim_s, 1024², batch 8": (8, 4097, 768, 24),
}
STATES = 16
DTYPE = torch.float16
DEVICE = torch.device("cuda")
REMOVE = 14  # of 197 tokens, as each of Vim-S's eleven reductions at 40 %


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def timings(name: str, shape: tuple[int, int, int, int], peaks: Peaks) -> list[dict[str, Any]]:
    """Milliseconds of every kernel of one block of two directions, and the largest of its bounds."""
    images, length, inner, rank = shape
    tokens, width, both = images * length, inner // 2, (False, True)
    in_proj, weight = normal(2 * inner, width, dtype=DTYPE), normal(width)
    x, z = normal(images, length, 2 * inner, dtype=DTYPE).chunk(2, dim=-1)
    weights = ops.MambaWeights(
        normal(2, inner, 1, 4),
        normal(2, inner),
        normal(2, rank + 2 * STATES, inner) * inner**-0.5,
        normal(2, inner, rank) * rank**-0.5,
        normal(2, inner) - 4,
        torch.arange(1.0, STATES + 1, device=DEVICE).log().expand(2, inner, STATES),
        normal(2, inner),
    )
    packed = ops.pack(weights, DTYPE)
    constants = packed.d, z, packed.timescale_bias, None, None, None
    u, delta, projected, _ = project.project(x, packed, None, both, ())
    bc = projected[..., -2 * STATES :]
    hidden, residual = normal(images, length, width, dtype=DTYPE), normal(images, length, width)
    terms, size = torch.rand(images, 2, length, device=DEVICE), torch.ones(images, length, device=DEVICE)
    special = torch.full((images, 1), length // 2, device=DEVICE)
    index = torch.arange(length, device=DEVICE).repeat(images, 1)
    remove = REMOVE * length // 197
    targets = (length - 1 - remove) // 2

    row = 2 * tokens * inner  # bytes of one (tokens, d_inner) tensor
    element = tokens * inner
    small = 8 * (rank + STATES) * element  # FLOPs of x_proj and dt_proj, both directions
    # By name: the call, its bytes of memory traffic, its FLOPs on the matrix units, its exponentials.
    kernels: dict[str, tuple[Callable[[], object], float, float, float]] = {
        "in_proj (library)": (lambda: F.linear(hidden, in_proj), 2.5 * row, 4 * element * width, 0),
        "project": (lambda: project.project(x, packed, None, both, ()), 5 * row, small, 4 * element),
        "project, statistics": (
            lambda: project.project(x, packed, None, both, ("delta", "write")), 5 * row, small, 4 * element
        ),
        "scan": (
            lambda: scan.scan(u, delta, packed.a, bc, *constants, both, (), softplus=False),
            6 * row, 0, 2 * element * STATES,
        ),
        "add and norm": (lambda: norm.norm_add(hidden, residual, weight, None, 1e-5, *(None,) * 7), 3 * row, 0, 0),
    }  # fmt: skip
    inputs = ops.DecisionInputs(terms, 1.0, index, size, special, hidden, residual, remove, targets, by_size=False)
    decide = partial(decision.asymmetric_plan, inputs)
    _, share, keep, removed, offsets, *_ = decide()
    pieces = keep, *(share, removed, offsets) * 2
    kernels |= {
        "plan": (decide, 6 * images * (remove + targets) * width, 0, 0),
        "add, reduce and norm": (lambda: norm.norm_add(hidden, residual, weight, None, 1e-5, *pieces), 3 * row, 0, 0),
    }
    if images > 8:  # training takes batches
        A, (b, c) = packed.a.transpose(1, 2).contiguous(), bc.split(STATES, dim=3)
        inputs = ScanInputs(u, delta, A, b, c, packed.d, z, packed.timescale_bias, reverse=both)
        backward = partial(scan_backward.selective_scan_backward, inputs, z.contiguous())
        kernels["scan, gradients"] = (backward, 10 * row, 0, 6 * element * STATES)

    rows = []
    for kernel, (run, moved, flops, exps) in kernels.items():
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        bound = 1e3 * max(moved / peaks.bytes, flops / peaks.flops, exps / peaks.exp if peaks.exp else 0)
        ms = float(do_bench_cudagraph(run, rep=50, return_mode="median"))  # a launch takes longer than some kernels
        rows.append({"shape": name, "kernel": kernel, "ms": ms, "bound_ms": bound, "first_call_s": first})
        print(f"{name:24} {kernel:22} {ms:8.3f} ms, bound {bound:7.3f} ({bound / ms:4.0%}), first call {first:6.2f} s")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    torch.manual_seed(0)
    peaks = measure_peaks(DEVICE, DTYPE)
    result: dict[str, Any] = {
        "schema": 1,
        "environment": {**describe_environment(), "triton": triton.__version__},
        "kernels": [],
    }
    for name, shape in SHAPES.items():
        result["kernels"] += timings(name, shape, peaks)
        with replace_file(out) as file:
            file.write(json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    main()
