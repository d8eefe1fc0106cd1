"""Speed of the CPU scan against the reference algorithm of mamba-ssm: one direction of Vim-Ti, two threads.

    python experiments/scan_cpu.py

Checks all implementations against float64, times them in turn, prints a table and writes results/scan_cpu.json.
"""

import json
import statistics
import time
from pathlib import Path

import numba
import torch
import torch.nn.functional as F

from mtr_lab import ops
from mtr_lab.results.atomic import replace_file
from mtr_lab.results.environment import describe_environment

SHAPES = {"batch": 8, "length": 197, "d_inner": 384, "d_state": 16}
THREADS = 2
ROUNDS = 40


def materialised_scan(u, delta, A, B, C, D, z, delta_bias):
    """mamba-ssm's ``selective_scan_ref``: decay and input of all tokens at once, (B, E, L, N), then a loop over tokens.

    Channels first: u, delta, z (B, E, L); A (E, N); B, C (B, N, L); D, delta_bias (E,).
    """
    delta = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bel,en->beln", delta, A))
    write = torch.einsum("bel,bnl,bel->beln", delta, B, u)
    state = torch.zeros_like(decay[:, :, 0])
    steps = []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + write[:, :, t]
        steps.append(torch.einsum("ben,bn->be", state, C[:, :, t]))
    return (torch.stack(steps, dim=2) + D[:, None] * u) * F.silu(z)


def random_inputs():
    batch, length, d_inner, d_state = SHAPES.values()
    torch.manual_seed(0)
    u, delta = torch.randn(2, 1, batch, length, d_inner)
    B, C = torch.randn(2, 1, batch, length, d_state)
    return {
        "u": u,
        "delta": delta,
        "A": -torch.arange(1.0, d_state + 1).expand(1, d_inner, -1).contiguous(),
        "B": B,
        "C": C,
        "D": torch.ones(1, d_inner),
        "z": torch.randn(batch, length, 2 * d_inner).chunk(2, dim=-1)[1],
        "delta_bias": torch.randn(1, d_inner) - 4,
    }


def ours(backend, inputs):
    with ops.use_backend(backend):
        return ops.selective_scan(**inputs)[0]


def main():
    torch.set_num_threads(THREADS)
    inputs = random_inputs()
    one = {name: x if name == "z" else x[0] for name, x in inputs.items()}
    channels_first = {name: x.transpose(1, 2).contiguous() if x.dim() == 3 else x for name, x in one.items()}
    implementations = {
        "selective_scan_ref": lambda: materialised_scan(**channels_first).transpose(1, 2),
        "reference": lambda: ours("reference", inputs),
        "cpu": lambda: ours("cpu", inputs),
    }
    exact = ours("reference", {name: x.double() for name, x in inputs.items()})
    milliseconds = {name: [] for name in implementations}
    with torch.inference_mode():
        for run in implementations.values():
            torch.testing.assert_close(run().double(), exact, rtol=1e-4, atol=1e-4)
        for _ in range(ROUNDS):
            for name, run in implementations.items():
                start = time.perf_counter()
                run()
                milliseconds[name].append(1000 * (time.perf_counter() - start))

    medians = {name: round(statistics.median(times), 3) for name, times in milliseconds.items()}
    ratios = {name: round(medians["selective_scan_ref"] / ms, 2) for name, ms in medians.items()}
    for name in implementations:
        print(f"{name:20}{medians[name]:10.2f} ms{ratios[name]:8.1f} x")
    machine = describe_environment()
    result = {
        "environment": {k: machine[k] for k in ("cpu", "threads", "python", "torch", "commit")}
        | {"numba": numba.__version__},
        "shapes": SHAPES,
        "rounds": ROUNDS,
        "median_ms": medians,
        "min_ms": {name: round(min(times), 3) for name, times in milliseconds.items()},
        "speedup": ratios,
    }
    with replace_file(Path(__file__).parent / "results" / "scan_cpu.json") as stream:
        stream.write(json.dumps(result, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
