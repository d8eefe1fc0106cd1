"""The mixer's training step against its composition in float64: outputs and the gradient of every parameter."""

import pytest
import torch

pytest.importorskip("triton")

from mtr_lab import ops
from mtr_lab.ops import mixer

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # by Triton's interpreter, as intended
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHECKS = ("test_schema", "test_faketensor")
# The interpreter does not round to the nearest bfloat16.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2 if DEVICE == "cuda" else 4e-2}


def make(length, channels, states, rank, width, directions, dtype, batch=2):
    generator = torch.Generator(torch.get_default_device()).manual_seed(length + 100 * channels)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    weights = ops.MambaWeights(
        conv_weight=[0.5 * normal(channels, 1, width) for _ in range(directions)],
        conv_bias=[normal(channels) for _ in range(directions)],
        x_proj=[normal(rank + 2 * states, channels) / channels**0.5 for _ in range(directions)],
        dt_proj=[normal(channels, rank) / rank**0.5 for _ in range(directions)],
        dt_bias=[normal(channels) - 2 for _ in range(directions)],
        A_log=[0.5 * normal(channels, states) for _ in range(directions)],
        D=[normal(channels) for _ in range(directions)],
    )
    return normal(batch, length, 2 * channels).to(dtype), weights, normal(batch, length, channels).to(dtype), normal


def gradients(xz, weights, grad, bc_grad, **options):
    leaves = [xz.requires_grad_(), *(p.requires_grad_() for field in weights for p in field)]
    y, sums, b, c = ops.mamba_inner(xz, weights, **options)
    outputs, grads = [y], [grad]
    if bc_grad is not None:
        outputs, grads = [y, b, c], [grad, *(t.to(b.dtype) for t in bc_grad)]
    return y, sums, torch.autograd.grad(outputs, leaves, grads)


def error(one, other):
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


@pytest.mark.parametrize(
    ("length", "channels", "states", "rank", "width", "reverse", "dtype", "use_bc"),
    [
        pytest.param(11, 70, 3, 17, 4, (False, True), torch.float32, True, marks=pytest.mark.slow),
        (3, 5, 3, 1, 2, (True,), torch.float32, True),
        pytest.param(16, 16, 8, 2, 3, (False, False, True), torch.float16, False, marks=pytest.mark.slow),
        (9, 16, 4, 3, 4, (True, False), torch.bfloat16, True),
        pytest.param(9, 32, 16, 4, 4, (True, False), torch.bfloat16, True, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_every_parameter_equal_float64(
    length, channels, states, rank, width, reverse, dtype, use_bc, monkeypatch
):
    monkeypatch.setattr(mixer, "fills_gpu", lambda xz: True)
    xz, weights, grad, normal = make(length, channels, states, rank, width, len(reverse), dtype)
    bc_grad = [normal(len(reverse), 2, length, states) for _ in range(2)] if use_bc else None
    options = {"reverse": reverse, "scale": 0.5, "stats": ("output", "delta")}
    with ops.use_backend("triton"):
        fields = dict.fromkeys(("order", "gap", "delta_scale", "repeats", "index", "source"))
        assert mixer.MAMBA_INNER.pick(xz, weights, None, 0.5, **options, **fields).name == "triton"
        y, sums, actual = gradients(xz, weights, grad, bc_grad, **options)
    wide = ops.MambaWeights(*([p.detach().double() for p in field] for field in weights))
    with ops.use_backend("reference"):
        expected_y, expected_sums, expected = gradients(xz.detach().double(), wide, grad.double(), bc_grad, **options)
    tolerance = TOLERANCE[dtype]
    assert error(y, expected_y) < tolerance
    assert error(sums, expected_sums) < tolerance
    names = ["xz", *(f"{name}[{g}]" for name in weights._fields for g in range(len(reverse)))]
    errors = {name: error(*pair) for name, *pair in zip(names, actual, expected, strict=True)}
    assert max(errors.values()) < tolerance, errors


@pytest.mark.slow
def test_registration():
    xz, weights, grad, _ = make(9, 6, 3, 2, 3, 2, torch.float32)
    packed, sizes = ops.pack(weights, xz.dtype), ([0, 1], 2, 3)
    for stats in ("", "delta", "write output"):
        arguments = xz, *packed, *sizes, stats, 0.5
        torch.library.opcheck(torch.ops.mtr_lab.mamba_inner_training.default, arguments, test_utils=CHECKS)
    _, _, projected, *saved = torch.ops.mtr_lab.mamba_inner_training(*arguments)
    operator = torch.ops.mtr_lab.mamba_inner_training_backward.default
    for projected_grad in (None, torch.ones_like(projected)):
        arguments = xz, *packed, projected, *saved, grad, projected_grad, *sizes, 0.5
        torch.library.opcheck(operator, arguments, test_utils=CHECKS)


@pytest.mark.slow
def test_strides_do_not_matter(monkeypatch):
    monkeypatch.setattr(mixer, "fills_gpu", lambda xz: True)
    xz, weights, grad, _ = make(3, 4, 2, 1, 3, 2, torch.float32)
    with ops.use_backend("triton"):
        *_, expected = gradients(xz, weights, grad, None, reverse=(False, True))
        transposed = xz.detach().transpose(0, 1).contiguous().transpose(0, 1)
        *_, actual = gradients(transposed, weights, grad.mT.contiguous().mT, None, reverse=(False, True))
    assert all(map(torch.equal, actual, expected))


def test_gradients_can_be_differentiated_again(monkeypatch):
    monkeypatch.setattr(mixer, "fills_gpu", lambda xz: True)

    def norm_of_gradients(xz, weights, grad):
        leaves = [xz.requires_grad_(), *(p.requires_grad_() for field in weights for p in field)]
        y, *_ = ops.mamba_inner(xz, weights, reverse=(False, True))
        first = torch.autograd.grad(y.square(), leaves, grad, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    xz, weights, grad, _ = make(3, 4, 2, 1, 3, 2, torch.float32)
    with ops.use_backend("triton"):
        actual = norm_of_gradients(xz, weights, grad)
    wide = ops.MambaWeights(*([p.detach().double() for p in field] for field in weights))
    with ops.use_backend("reference"):
        expected = norm_of_gradients(xz.detach().double(), wide, grad.double())
    assert max(map(error, actual, expected)) < 1e-5
