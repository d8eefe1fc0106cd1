"""The scan of exported models: no loop over tokens, finite and within its error bound for every Δ."""

import pytest
import torch
import torch.nn.functional as F

from mtr_lab import ops
from mtr_lab.ops.scan_portable import STEPS, UNROLLED

EXPONENTIAL = 2  # roundings in an exponential of PyTorch


def error_bound(delta, write, B, C, A):
    """The bound that the module derives, on the output (G, B, L, E), in float64; arguments as ``selective_scan``."""
    length, levels = delta.shape[2], 1
    while UNROLLED * STEPS**levels < length:
        levels += 1
    further = 2 + UNROLLED + STEPS * levels + A.shape[2]  # with the sum over states
    plain = by_exponent = by_distance = torch.zeros(*delta.shape[:2], *A.shape[1:], dtype=torch.float64)
    bounds = []
    for t in range(length):
        exponent = delta[:, :, t, :, None] * -A[:, None]
        decay = torch.exp(-exponent)
        by_exponent = decay * (by_exponent + exponent * plain)
        by_distance = decay * (by_distance + plain)
        plain = decay * plain + write[:, :, t, :, None].abs() * B[:, :, t, None].abs()
        total = by_exponent + (EXPONENTIAL + 1) * by_distance + further * plain
        bounds.append((total * C[:, :, t, None].abs()).sum(-1))
    return torch.stack(bounds, dim=2) * torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 64, 65, 197, 700])
@pytest.mark.parametrize("spread", [1e-6, 1, 50, 1e4, 1e30])
def test_error_bound_for_every_timescale(length: int, spread: float) -> None:
    """``spread`` is the largest Δ; in the same sequence others are near 0."""
    generator = torch.Generator().manual_seed(length)
    images, channels, states = 2, 5, 4
    u, B, C = (torch.randn(1, images, length, n, generator=generator) for n in (channels, states, states))
    exact = spread * torch.rand(1, images, length, channels, generator=generator) ** 8
    delta = torch.where(exact < 20, exact.expm1().log(), exact).clamp(min=-100)  # before softplus
    A = -torch.arange(1, states + 1).expand(1, channels, -1).float() * 8 ** torch.randn(
        1, channels, 1, generator=generator
    )
    with ops.use_backend("portable"):
        y, _ = ops.selective_scan(u, delta, A, B, C, torch.zeros(1, channels))
    assert torch.isfinite(y).all()
    step = F.softplus(delta)  # of float32, as the scan reads it
    u, step, A, B, C = (t.double() for t in (u, step, A, B, C))
    with ops.use_backend("reference"):
        inverse = step + torch.log(-torch.expm1(-step))
        truth, _ = ops.selective_scan(u, inverse, A, B, C, torch.zeros(1, channels, dtype=torch.float64))
    bound = error_bound(step, step * u, B, C, A)
    assert ((y - truth).abs() <= bound[0] + 1e-300).all()
