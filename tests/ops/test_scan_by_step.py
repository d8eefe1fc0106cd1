"""A scan of which the input alone follows the paths, against a loop over steps and against ``selective_scan``."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mtr_lab import UserError, ops

SHAPES = [(2, 15, 70, 3, 4), (1, 37, 130, 1, 3), (3, 1, 5, 16, 1), (1, 33, 64, 2, 2), (0, 5, 6, 2, 3)]
"""Images, tokens, channels, states, paths."""


def scan_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    images, length, channels, states, paths = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(paths)])
    rows = images, length
    return {
        "u": normal(*rows, channels),
        "delta": normal(*rows, channels),
        "A": -normal(channels, states).exp(),
        "B": normal(*rows, states),
        "C": normal(*rows, states),
        "D": normal(channels),
        "order": order,
        "steps": order.argsort(1),
        "moves": normal(paths, length, states),
        "delta_bias": normal(channels),
        "z": normal(*rows, channels),
    }


def by_steps(u, delta, A, B, C, D, order, steps, moves, delta_bias, z) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the sums of Δ and of the positive outputs, (G, B, L) each."""
    dt, total = F.softplus(delta + delta_bias), torch.zeros_like(u)
    sums, outputs = torch.zeros(2, len(order), *u.shape[:2], dtype=u.dtype)
    for g, path in enumerate(order):
        state = u.new_zeros(len(u), *A.shape)
        for s, token in enumerate(path):
            state = torch.exp(dt[:, s, :, None] * A) * state
            state = state + (dt[:, s] * u[:, token])[..., None] * (B[:, s] + moves[g, s])[:, None]
            y = (state * C[:, s, None]).sum(-1) + D * u[:, token]
            total[:, token] += y
            sums[g, :, token], outputs[g, :, token] = dt[:, s].sum(-1), y.clamp(min=0).sum(-1)
    return total * F.silu(z), sums, outputs


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["reference", "portable", "cpu"])
@torch.no_grad()
def test_it_equals_a_loop_over_steps(shape: tuple[int, ...], backend: str) -> None:
    inputs = scan_inputs(shape, torch.float64)
    y, *sums = by_steps(**inputs)
    single = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    with ops.use_backend(backend):
        actual, statistics = ops.scan_by_step(**single, stats=("output", "delta"))
    torch.testing.assert_close(actual.double(), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics.double(), torch.stack(sums[::-1], dim=-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [True, False])
def test_the_kernel_has_the_bits_of_the_scan_with_copies(shape: tuple[int, ...], gated: bool) -> None:
    """So a model has the same output with and without gradients, and with a policy that removes nothing."""
    inputs = scan_inputs(shape) | ({} if gated else {"z": None})
    with torch.no_grad():
        expected, sums = ops.scan_by_step(**inputs, stats=ops.STATS)
    inputs["u"].requires_grad_()
    actual, statistics = ops.scan_by_step(**inputs, stats=ops.STATS)
    assert actual.requires_grad
    assert torch.equal(actual, expected)
    assert torch.equal(statistics, sums)


def test_flops_are_those_of_the_scan() -> None:
    counted = []
    for differentiable in (False, True):
        inputs = scan_inputs(SHAPES[0])
        inputs["u"].requires_grad_(differentiable)
        with FlopCounterMode(display=False) as counter:
            ops.scan_by_step(**inputs)
        counted.append(counter.get_total_flops())
    assert counted == [4 * 2 * 15 * 70 * (9 * 3 + 2)] * 2


@pytest.mark.parametrize("transposed", [False, True])
@torch.no_grad()
def test_the_operator_can_be_decomposed(transposed: bool) -> None:
    inputs = scan_inputs(SHAPES[0])
    if transposed:
        inputs["u"] = inputs["u"].mT.contiguous().mT
    bias, z = inputs.pop("delta_bias"), inputs.pop("z")
    operator = torch.ops.mtr_lab.scan_by_step.default
    arguments = (*inputs.values(), z, bias, "delta", "cpu")
    for actual, expected in zip(ops.decompositions()[operator](*arguments), operator(*arguments), strict=True):
        torch.testing.assert_close(actual, expected)
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("delta", lambda x: x[:, :-1], r"delta has shape \(2, 14, 70\), expected \(2, 15, 70\)"),
        ("B", lambda x: x[..., :2], r"B has shape \(2, 15, 2\), expected \(2, 15, 3\)"),
        ("D", lambda x: x[:-1], r"D has shape \(69,\), expected \(70,\)"),
        ("steps", lambda x: x[:3], r"steps has shape \(3, 15\), expected \(4, 15\)"),
        ("moves", lambda x: x[:, :-1], r"moves has shape \(4, 14, 3\), expected \(4, 15, 3\)"),
        ("order", lambda x: x.int(), r"order has dtype torch.int32, expected torch.int64"),
        ("u", lambda x: x[0], r"expected u \(B, L, E\)"),
    ],
)
@pytest.mark.parametrize("backend", ["portable", "cpu"])
def test_arguments_that_do_not_match_are_refused(name: str, change: Any, message: str, backend: str) -> None:
    inputs = scan_inputs(SHAPES[0])
    inputs[name] = change(inputs[name])
    with ops.use_backend(backend), pytest.raises(UserError, match=message):
        ops.scan_by_step(**inputs)
