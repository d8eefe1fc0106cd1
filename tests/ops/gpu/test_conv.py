"""The convolution kernels against the reference and its autograd in float64, by relative L2 error."""

import pytest
import torch

pytest.importorskip("triton")

from mtr_lab.ops.convolution import causal_conv1d_reference
from mtr_lab.ops.convolution_unmerged import causal_conv1d_unmerged_reference, causal_conv1d_unmerged_triton
from mtr_lab.ops.gpu.conv import causal_conv1d, causal_conv1d_backward

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # by Triton's interpreter, as intended
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def assert_equal_reference(x, weight, bias, reverse):
    inputs = x, weight, bias
    grad = torch.randn(len(reverse), *x.shape, generator=torch.Generator(x.device).manual_seed(0)).to(x)
    y = causal_conv1d(*inputs, reverse)
    grads = causal_conv1d_backward(*inputs, reverse, grad)

    wide = [t.double().requires_grad_() for t in inputs]
    expected = causal_conv1d_reference(*wide, reverse)
    expected_grads = torch.autograd.grad(expected, wide, grad.double())
    for actual, exact, like in zip((y, *grads), (expected, *expected_grads), (grad, *inputs), strict=True):
        assert actual.dtype == like.dtype
        assert actual.shape == like.shape
        assert actual.is_contiguous()
        assert (actual.double() - exact).norm() <= TOLERANCE[actual.dtype] * exact.norm()


def random_inputs(batch, length, channels, width, directions, dtype=torch.float32, weight_dtype=torch.float32):
    generator = torch.Generator(torch.get_default_device()).manual_seed(length + 1000 * channels)

    def normal(*shape, dtype):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    return (
        normal(batch, length, channels, dtype=dtype),
        normal(directions, channels, width, dtype=weight_dtype),
        normal(directions, channels, dtype=weight_dtype),
    )


@pytest.mark.parametrize(
    ("batch", "length", "channels", "width", "reverse"),
    [
        (1, 1, 1, 1, (False,)),
        (2, 1, 3, 4, (True,)),
        (2, 3, 64, 4, (False, True)),  # shorter than the kernel
        (1, 33, 67, 2, (True, False)),  # one more than whole tiles of tokens
        (2, 19, 5, 3, (True,)),
        (1, 16, 7, 5, (False, True, True)),
    ],
)
def test_shapes(batch, length, channels, width, reverse):
    assert_equal_reference(*random_inputs(batch, length, channels, width, len(reverse)), reverse)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, weight_dtype):
    assert_equal_reference(*random_inputs(2, 9, 13, 4, 2, dtype, weight_dtype), (False, True))


def test_strides():
    x, weight, bias = random_inputs(2, 9, 13, 4, 2)
    half = torch.cat([torch.full_like(x, torch.nan), x], dim=-1).chunk(2, dim=-1)[1]
    channels_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    for view in (half, channels_first, x.expand(2, -1, -1)):
        assert_equal_reference(view, weight, bias, (False, True))


def test_extremes_neither_overflow_nor_cancel():
    x = torch.tensor([-1e30, -100.0, 0.0, 100.0, 1e30], device=DEVICE)[None, :, None]
    weight, bias = torch.tensor([[[0.0, 1.0]]], device=DEVICE), torch.zeros(1, 1, device=DEVICE)
    y = causal_conv1d(x, weight, bias, (False,))
    dx, _, _ = causal_conv1d_backward(x, weight, bias, (False,), torch.ones_like(y))
    assert y.flatten().tolist() == pytest.approx([0.0, 0.0, 0.0, 100.0, 1e30])
    assert dx.flatten().tolist() == pytest.approx([0.0, 0.0, 0.5, 1.0, 1.0])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("batch", "length", "positions", "channels", "width", "reverse"),
    [(1, 1, 1, 1, 2, (False,)), (2, 9, 20, 67, 4, (False, True)), (1, 8, 11, 128, 3, (True, True, False))],
)
def test_unmerged(batch, length, positions, channels, width, reverse, dtype):
    x, weight, bias = random_inputs(batch, length, channels, width, len(reverse), dtype)
    index = torch.stack([torch.randperm(positions)[:length].sort().values for _ in range(batch)])
    source = torch.randint(-1, length, (batch, positions))
    y = causal_conv1d_unmerged_triton(x, weight, bias, index, source, reverse)
    expected = causal_conv1d_unmerged_reference(x.double(), weight.double(), bias.double(), index, source, reverse)
    assert (y.dtype, y.shape) == (dtype, expected.shape)
    assert (y.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
