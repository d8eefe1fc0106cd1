"""The gradients of addition and normalisation against float64, with and without a residual stream, bias and plan."""

import pytest
import torch
from test_norm import plans

pytest.importorskip("triton")

from mtr_lab import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("shape", "dtype", "first", "layer", "planned"),
    [
        ((2, 5, 33), torch.float32, False, True, False),
        ((1, 19, 64), torch.float32, True, False, False),
        ((3, 7, 192), torch.bfloat16, False, False, False),
        ((2, 9, 24), torch.float16, False, True, True),
    ],
)
def test_equals_float64(shape, dtype, first, layer, planned):
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    hidden, residual, *grads = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(4))
    plan = plans(shape[0], shape[1], 3) if planned else None
    weight = torch.linspace(-1, 2, shape[2])
    if planned:
        grads = [g[:, : shape[1] - 3] for g in grads]

    def run(*inputs):
        stream = None if first else inputs[1]
        rest = (inputs[2], inputs[2].flip(0)) if layer else (inputs[2],)
        return (ops.layer_norm_add if layer else ops.rms_norm_add)(inputs[0], stream, *rest, plan=plan)

    def gradients(*inputs):
        inputs = [t.requires_grad_() for t in inputs]
        normed, total = run(*inputs)
        used = [inputs[0], inputs[2]] if first else inputs
        return torch.autograd.grad((normed, total), used, (grads[0].to(normed.dtype), grads[1].to(total.dtype)))

    with ops.use_backend("triton"):
        actual = gradients(hidden.to(dtype), residual.clone(), weight.clone())
    with ops.use_backend("reference"):
        expected = gradients(hidden.to(dtype).double(), residual.double(), weight.double())
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for one, other in zip(actual, expected, strict=True):
        assert ((one.double() - other).norm() / other.norm()).item() < tolerance
