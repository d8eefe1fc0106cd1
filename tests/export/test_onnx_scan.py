"""The scan of ONNX files: finite and within its error bound for every Δ, with one to three levels of chunks."""

import numpy as np
import pytest
import torch
from torch import nn

from mtr_lab import ops

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from onnxscript import tensor  # noqa: E402

from mtr_lab.export import onnx_scan  # noqa: E402
from mtr_lab.export.onnx_file import Onnx, OnnxFile, simplify, translations  # noqa: E402
from mtr_lab.export.tracing import exported_program  # noqa: E402

EXPONENTIAL = 2  # roundings in an exponential of ONNX Runtime
SOFTPLUS = 6  # roundings in Δ
SHAPES = {"images": 2, "channels": 5, "states": 4}
UNIT = torch.finfo(torch.float32).eps / 2


def test_softplus_is_exact_to_a_few_roundings() -> None:
    x = np.concatenate([np.linspace(-87, 87, 4001), np.geomspace(1e-30, 1, 200), -np.geomspace(1e-30, 1, 200)])
    x = x.astype(np.float32)
    expected = np.logaddexp(0, x.astype(np.float64))
    actual = onnx_scan.softplus(tensor.Tensor(x)).value
    assert (np.abs(actual - expected) <= SOFTPLUS * UNIT * expected).all()


class Scan(nn.Module):
    """The scan of (B, L, 2 E + 2 N): u, delta, B, C."""

    def __init__(self, A: torch.Tensor) -> None:
        super().__init__()
        self.A = A

    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        channels, states = self.A.shape[1:]
        u, delta, B, C = packed[None].split([channels, channels, states, states], dim=3)
        return ops.selective_scan(u, delta, self.A, B, C, torch.zeros(1, channels))[0]


def error_bound(delta: torch.Tensor, write: torch.Tensor, B: torch.Tensor, C: torch.Tensor, A: torch.Tensor):
    """What ``mtr_lab.ops.scan_portable`` derives, with ``STEPS`` · z for sums of exponents, (G, B, L, E) float64."""
    length, levels = delta.shape[2], 1
    while onnx_scan.UNROLLED * onnx_scan.STEPS**levels < length:
        levels += 1
    further = 2 + onnx_scan.UNROLLED + onnx_scan.STEPS * levels + A.shape[2] + SOFTPLUS
    plain = by_exponent = by_distance = torch.zeros(*delta.shape[:2], *A.shape[1:], dtype=torch.float64)
    bounds = []
    for t in range(length):
        exponent = delta[:, :, t, :, None] * -A[:, None]
        decay = torch.exp(-exponent)
        by_exponent = decay * (by_exponent + exponent * plain)
        by_distance = decay * (by_distance + plain)
        plain = decay * plain + write[:, :, t, :, None].abs() * B[:, :, t, None].abs()
        total = (onnx_scan.STEPS + SOFTPLUS) * by_exponent + (EXPONENTIAL + 1) * by_distance + further * plain
        bounds.append((total * C[:, :, t, None].abs()).sum(-1))
    return torch.stack(bounds, dim=2) * UNIT


@pytest.mark.parametrize("length", [7, 197, 410, pytest.param(3600, marks=pytest.mark.slow)])
def test_error_bound_for_every_timescale(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    images, channels, states = SHAPES.values()
    A = -torch.arange(1, states + 1).expand(1, channels, -1).float()
    A = A * 8 ** torch.randn(1, channels, 1, generator=generator)
    u, B, C = (torch.randn(1, images, length, n, generator=generator) for n in (channels, states, states))
    scan = Scan(A)
    packed = torch.cat([u, u, B, C], dim=3)[0]
    program = exported_program(scan, packed, dynamic=True, whole=["selective_scan"])
    translated = torch.onnx.export(
        program,
        (),
        dynamo=True,
        opset_version=18,
        custom_translation_table=translations(),
        verbose=False,
        optimize=False,
    ).model
    simplify(translated)
    run = OnnxFile(Onnx(translated, []).content(plans=True))
    for spread in (1e-6, 1, 50, 1e4, 1e30):  # the largest Δ; in the same sequence others are near 0
        exact = spread * torch.rand(1, images, length, channels, generator=generator) ** 8
        delta = torch.where(exact < 20, exact.expm1().log(), exact).clamp(min=-100)  # before softplus
        y = run(torch.cat([u, delta, B, C], dim=3)[0])
        assert torch.isfinite(y).all()
        wide = [x.double() for x in (u, delta, A, B, C)]
        with ops.use_backend("reference"):
            truth, _ = ops.selective_scan(*wide, torch.zeros(1, channels, dtype=torch.float64))
        step = torch.where(wide[1] > 20, wide[1], torch.log1p(torch.exp(wide[1].clamp(max=20))))
        bound = error_bound(step, step * wide[0], wide[3], wide[4], wide[2])
        assert ((y - truth).abs() <= bound[0] + 1e-300).all()
