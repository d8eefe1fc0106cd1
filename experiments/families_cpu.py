"""Speed of every family on one CPU thread: its scan against the algorithm of its authors' reference, and the whole
forward pass against its matrix products alone.

    python experiments/families_cpu.py [FAMILY …]

Times are seconds of the processor, not of the clock, least of several rounds in turn, so that other programs disturb
them little. Prints a table and writes results/families_cpu.json.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mtr_lab
from mtr_lab import ops
from mtr_lab.results.atomic import replace_file
from mtr_lab.results.environment import describe_environment

BATCH, SCAN_ROUNDS, MODEL_ROUNDS = 8, 40, 8
SCANS = {  # (directions, tokens, channels, states) of each stage
    "vim_ti": [(2, 197, 384, 16)],
    "videomamba_ti": [(2, 197, 384, 16)],
    "mambareg_s": [(2, 208, 768, 16)],
    "plainmamba_l1": [(4, 196, 384, 16)],
    "vmamba_t": [(4, 3136, 96, 1), (4, 784, 192, 1), (4, 196, 384, 1), (4, 49, 768, 1)],
    "mambavision_t": [(1, 196, 160, 8), (1, 49, 320, 8)],
}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu")


class Products(TorchDispatchMode):
    """Records the matrix products of a forward pass, with dense convolutions and attention among them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        if name in PRODUCTS and not (name == "convolution" and args[8] > 1):
            self.calls.append((func, args, kwargs))
        return func(*args, **kwargs)

    def run(self) -> None:
        """The recorded products as PyTorch computes them."""
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)

    def run_onednn(self) -> None:
        """The same products, those of matrices by oneDNN."""
        for function, args, kwargs in self.calls:
            name = function._schema.name.removeprefix("aten::")
            if name in ("mm", "addmm"):
                bias, x, weight = args if name == "addmm" else (None, *args)
                ops.linear(x, weight.mT, bias)
            elif name == "bmm":
                for x, weight in zip(*args, strict=True):
                    ops.linear(x, weight.mT)
            else:
                function(*args, **kwargs)


def reference_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    """One direction as the authors' references compute it: decay and input of all tokens at once, then a loop.

    Channels first: u, delta (B, E, L); A (E, N); B, C (B, N, L); D, bias (E,).
    """
    delta = F.softplus(delta + bias[:, None])
    decay = torch.exp(torch.einsum("bel,en->beln", delta, A))
    write = torch.einsum("bel,bnl,bel->beln", delta, B, u)
    state, steps = torch.zeros_like(decay[:, :, 0]), []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + write[:, :, t]
        steps.append(torch.einsum("ben,bn->be", state, C[:, :, t]))
    return torch.stack(steps, dim=2) + D[:, None] * u


def least(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The least processor time of each function, seconds, of rounds in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    return {name: min(values[1:]) for name, values in times.items()}


def scan_times(directions: int, length: int, channels: int, states: int) -> dict[str, float]:
    """Of all directions, checked against each other."""
    torch.manual_seed(0)
    u, delta = torch.randn(2, directions, BATCH, length, channels)
    B, C = torch.randn(2, directions, BATCH, length, states)
    A = -torch.arange(1.0, states + 1).expand(directions, channels, -1).contiguous()
    D, bias = torch.ones(directions, channels), torch.randn(directions, channels) - 4
    reverse = [False] * directions

    def ours() -> Tensor:
        return ops.selective_scan(u, delta, A, B, C, D, delta_bias=bias, reverse=reverse)[0]

    first = [tuple(t.mT.contiguous() for t in (u[k], delta[k], B[k], C[k])) for k in range(directions)]

    def authors() -> Tensor:
        parts = (reference_scan(x, d, A[k], b, c, D[k], bias[k]) for k, (x, d, b, c) in enumerate(first))
        return sum(parts).mT  # type: ignore[union-attr]

    torch.testing.assert_close(ours(), authors(), rtol=1e-3, atol=1e-3)
    return least({"reference": authors, "ours": ours}, SCAN_ROUNDS)


def model_times(name: str) -> dict[str, float]:
    """Of a forward pass, and of its matrix products, as PyTorch and as oneDNN compute them."""
    torch.manual_seed(0)
    model: nn.Module = mtr_lab.create_model(name).eval()
    images, recorded = torch.randn(BATCH, 3, 224, 224), Products()
    # Inference mode would record layers, kernels would hide their products.
    with torch.inference_mode(False), torch.no_grad(), ops.use_backend("reference"), recorded:
        model(images.clone())
    runs = {"pytorch_products": recorded.run, "products": recorded.run_onednn, "forward": lambda: model(images)}
    return least(runs, MODEL_ROUNDS)


@torch.inference_mode()
def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    families = {}
    print(f"{'model':14s} {'products':>9s} {'forward':>8s} {'share':>6s}   scans: tokens × channels × states, speedup")
    for name in sys.argv[1:] or SCANS:
        model, scans = model_times(name), {}
        for directions, length, channels, states in SCANS[name]:
            scan = scan_times(directions, length, channels, states)
            scans[f"{directions} x {length} x {channels} x {states}"] = {key: 1e3 * t for key, t in scan.items()}
        families[name] = {"seconds": model, "scan_ms": scans}
        speedups = ", ".join(f"{shape}: {t['reference'] / t['ours']:.1f}" for shape, t in scans.items())
        products, forward = model["products"], model["forward"]
        print(f"{name:14s} {products:9.3f} {forward:8.3f} {products / forward:6.1%}   {speedups}", flush=True)
    if not sys.argv[1:]:
        machine = describe_environment()
        environment = {key: machine[key] for key in ("cpu", "threads", "python", "torch", "commit")}
        result = {"environment": environment, "batch": BATCH, "families": families}
        with replace_file(Path(__file__).parent / "results" / "families_cpu.json") as stream:
            stream.write(json.dumps(result, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
