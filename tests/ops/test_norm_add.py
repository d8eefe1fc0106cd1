import numpy as np
import pytest
import torch

from mtr_lab import ops


def random_inputs(dtype, length=5, channels=33):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, length, channels, generator=generator).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return hidden, 3 * torch.randn(2, length, channels, generator=generator).to(wide), torch.linspace(-1, 2, channels)


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)],
)
def test_adds_then_normalises(dtype, tolerance, first, layer):
    hidden, residual, weight = random_inputs(dtype)
    bias, stream = weight.flip(0), None if first else residual
    normed, total = (
        ops.layer_norm_add(hidden, stream, weight, bias, eps=1e-3)
        if layer
        else ops.rms_norm_add(hidden, stream, weight, eps=1e-3)
    )

    expected = hidden.double().numpy() + (0 if first else residual.double().numpy())
    np.testing.assert_allclose(total.double().numpy(), expected, rtol=1e-6)
    if layer:
        expected = expected - expected.mean(-1, keepdims=True)
    mean_square = (expected**2).mean(-1, keepdims=True)
    expected = expected / np.sqrt(mean_square + 1e-3) * weight.double().numpy() + layer * bias.double().numpy()
    np.testing.assert_allclose(normed.double().numpy(), expected, rtol=tolerance, atol=tolerance)
    assert normed.dtype == dtype
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_residual_stream_keeps_what_half_precision_would_lose():
    hidden = torch.full((1, 1, 4), 1.0, dtype=torch.bfloat16)
    residual = torch.full((1, 1, 4), 1000.0)
    _, total = ops.rms_norm_add(hidden, residual, torch.ones(4))
    assert torch.equal(total, torch.full((1, 1, 4), 1001.0))


def test_gradients():
    hidden, residual, weight = random_inputs(torch.float64, length=2, channels=3)
    inputs = [t.double().requires_grad_() for t in (hidden, residual, weight)]
    assert torch.autograd.gradcheck(ops.rms_norm_add, inputs)
    assert torch.autograd.gradcheck(ops.layer_norm_add, [*inputs, weight.double().flip(0).requires_grad_()])


@pytest.mark.parametrize("channels", [33, 70, 192])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("merged_before", [False, True])
def test_a_plan_is_applied_to_both_streams(channels, apart, layer, merged_before):
    hidden, residual, weight = random_inputs(torch.float64, 9, channels)
    source, into = torch.tensor([[2, 5, 7], [0, 3, 4]]), torch.tensor([[3, -1, 3], [8, 8, 1]])
    plan = ops.make_plan(source, into, torch.arange(9.0).expand(2, -1), torch.ones(2, 9))
    other = plan._replace(weight=0.5 * plan.weight) if apart else None
    plan, bias = plan._replace(residual=other), weight.flip(0)
    if merged_before:
        hidden = ops.apply_plan(hidden, *plan[:5])

    def run(dtype):
        streams = hidden.to(dtype), residual.to(dtype)
        if layer:
            return ops.layer_norm_add(*streams, weight.to(dtype), bias.to(dtype), plan=plan)
        return ops.rms_norm_add(*streams, weight.to(dtype), plan=plan)

    for one, exact in zip(run(torch.float32), run(torch.float64), strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-5)
