"""The convolution of every implementation against a float64 loop in numpy."""

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mtr_lab import UserError, ops

CUDA_KERNELS = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("causal_conv1d") is None or not torch.cuda.is_available(),
        reason="needs causal-conv1d and a CUDA device",
    ),
]
IMPLEMENTATIONS = [
    pytest.param("reference", torch.float64, 1e-12, id="reference-float64"),
    pytest.param("reference", torch.float32, 2e-6, id="reference-float32"),
    pytest.param("cpu", torch.float32, 2e-6, id="cpu-float32"),
    pytest.param("mamba_ssm", torch.float32, 1e-4, id="mamba_ssm-float32", marks=CUDA_KERNELS),
]


def random_inputs(batch, length, channels, width, directions, dtype=torch.float32):
    generator = torch.Generator().manual_seed(length + 1000 * channels)
    shapes = (batch, length, channels), (directions, channels, width), (directions, channels)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def conv_loop(x, weight, bias, reverse):
    """silu(bias + Σ_k weight[k] x[t - (W-1-k)]); t + (W-1-k) in a backward direction."""
    x, weight, bias = (t.double().cpu().numpy() for t in (x, weight, bias))
    length, width = x.shape[1], weight.shape[-1]
    total = np.zeros((len(reverse), *x.shape))
    for g, backward in enumerate(reverse):
        for t in range(length):
            total[g, :, t] = bias[g]
            for k in range(width):
                source = t + (width - 1 - k) * (1 if backward else -1)
                if 0 <= source < length:
                    total[g, :, t] += weight[g, :, k] * x[:, source]
    return total * np.exp(-np.logaddexp(0, -total))


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), IMPLEMENTATIONS)
@settings(max_examples=20)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 300),
    channels=st.integers(1, 140),
    width=st.integers(2, 4),
    reverse=st.sampled_from([(False,), (True,), (False, True), (True, False)]),
)
@example(batch=1, length=1, channels=1, width=4, reverse=(True,))
@example(batch=2, length=3, channels=64, width=4, reverse=(False, True))
def test_conv_equals_the_loop_over_taps(backend, dtype, tolerance, batch, length, channels, width, reverse):
    inputs = random_inputs(batch, length, channels, width, len(reverse), dtype)
    if backend == "mamba_ssm":
        inputs = [t.cuda() for t in inputs]
    with ops.use_backend(backend):
        y = ops.causal_conv1d(*inputs, reverse=reverse)
    assert y.dtype == dtype
    magnitude = np.abs(conv_loop(*(t.abs() for t in inputs), reverse))
    assert (np.abs(y.double().cpu().numpy() - conv_loop(*inputs, reverse)) <= tolerance * magnitude).all()


def test_cpu_takes_any_strides():
    x, weight, bias = random_inputs(2, 9, 70, 4, 2)
    half = torch.cat([x, torch.zeros_like(x)], dim=-1).chunk(2, dim=-1)[0]
    channels_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    with ops.use_backend("cpu"):
        expected = ops.causal_conv1d(x, weight, bias, reverse=(False, True))
        for view in (half, channels_first):
            assert torch.equal(ops.causal_conv1d(view, weight, bias, reverse=(False, True)), expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_extremes_and_nan(backend):
    x = torch.tensor([-1e30, -100.0, 0.0, 100.0, 1e30, torch.nan])[None, :, None]
    with ops.use_backend(backend):
        y = ops.causal_conv1d(x, torch.tensor([[[0.0, 1.0]]]), torch.zeros(1, 1))[0, 0, :, 0]
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 0.0, 100.0, 1e30, torch.nan]), equal_nan=True)


def test_an_image_does_not_depend_on_its_batch_mates():
    x, weight, bias = random_inputs(5, 30, 130, 4, 2)
    with ops.use_backend("cpu"):
        y = ops.causal_conv1d(x, weight, bias, reverse=(False, True))
        for b in range(5):
            alone = ops.causal_conv1d(x[b : b + 1], weight, bias, reverse=(False, True))
            assert torch.equal(alone[:, 0], y[:, b])


def test_gradients():
    inputs = [t.requires_grad_() for t in random_inputs(2, 5, 3, 4, 2, torch.float64)]
    assert torch.autograd.gradcheck(lambda *args: ops.causal_conv1d(*args, reverse=(False, True)), inputs)


def test_gradients_of_the_cpu_forward_equal_float64():
    grads = {}
    for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "reference")):
        inputs = [t.to(dtype).requires_grad_() for t in random_inputs(2, 9, 70, 4, 2)]
        with ops.use_backend(backend):
            y = ops.causal_conv1d(*inputs, reverse=(True, False))
        grads[backend] = torch.autograd.grad(y.square().sum(), inputs)
    for single, double in zip(grads["cpu"], grads["reference"], strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_registration(backend):
    inputs = [t.requires_grad_() for t in random_inputs(2, 5, 3, 4, 2)]
    torch.library.opcheck(torch.ops.mtr_lab.causal_conv1d.default, (*inputs, [False, True], backend))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiles_without_graph_break(backend):
    x, weight, bias = random_inputs(2, 9, 70, 4, 1)

    def doubled(x):
        return 2 * ops.causal_conv1d(x, weight, bias, reverse=(True,))

    with ops.use_backend(backend):
        compiled = torch.compile(doubled, backend="eager", fullgraph=True)(x)
        assert torch.equal(compiled, doubled(x))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_flops(backend):
    x, weight, bias = random_inputs(3, 9, 7, 4, 2)
    with ops.use_backend(backend), FlopCounterMode(display=False) as counter:
        ops.causal_conv1d(x, weight, bias, reverse=(False, True))
    assert counter.get_total_flops() == 2 * (2 * 4) * (3 * 9 * 7)


REVERSES = [(False,), (True,), (False, True), (True, False)]


def random_positions(batch, length, positions):
    """Index (B, L) of survivors, and source (B, L0) where each position has some token, itself a survivor's own."""
    rows = [torch.randperm(positions)[:length] for _ in range(batch)]  # in any order
    index, source = torch.stack(rows), torch.randint(length, (batch, positions))
    return index, source.scatter(1, index, torch.arange(length).expand(batch, -1))


def unmerged_loop(x, weight, bias, index, source, reverse):
    """Put every position back, convolve, and take the tokens."""
    images = [
        torch.stack([row[t] if t >= 0 else torch.zeros_like(row[0]) for t in s])
        for row, s in zip(x, source, strict=True)
    ]
    y = conv_loop(torch.stack(images), weight, bias, reverse)
    return np.stack([y[:, b, index[b].numpy()] for b in range(len(x))], axis=1)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), IMPLEMENTATIONS[:3])
@settings(max_examples=20)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    merged=st.integers(0, 40),
    channels=st.integers(1, 140),
    width=st.integers(2, 4),
    reverse=st.sampled_from(REVERSES),
    dropped=st.booleans(),
)
@torch.no_grad()
def test_unmerged_equals_putting_every_position_back(
    backend, dtype, tolerance, batch, length, merged, channels, width, reverse, dropped
):
    inputs = random_inputs(batch, length, channels, width, len(reverse), dtype)
    torch.manual_seed(length + 100 * merged)
    index, source = random_positions(batch, length, length + merged)
    if dropped:
        source = source.masked_fill(torch.rand(source.shape) < 0.3, -1)
    with ops.use_backend(backend):
        y = ops.causal_conv1d(*inputs, reverse=reverse, index=index, source=source)
    assert y.dtype == dtype
    magnitude = np.abs(unmerged_loop(*(t.abs() for t in inputs), index, source, reverse))
    expected = unmerged_loop(*inputs, index, source, reverse)
    assert (np.abs(y.double().numpy() - expected) <= tolerance * magnitude).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@torch.no_grad()
def test_unmerged_of_an_unreduced_sequence_is_the_convolution(backend):
    inputs = random_inputs(2, 9, 70, 4, 2)
    every = torch.arange(9).expand(2, -1)
    with ops.use_backend(backend):
        expected = ops.causal_conv1d(*inputs, reverse=(False, True))
        y = ops.causal_conv1d(*inputs, reverse=(False, True), index=every, source=every)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_gradients_of_the_unmerged_convolution():
    inputs = [t.requires_grad_() for t in random_inputs(2, 4, 3, 4, 2, torch.float64)]
    index, source = random_positions(2, 4, 7)
    positions = {"index": index, "source": source.index_fill(1, torch.tensor([5]), -1)}

    def run(*inputs):
        return ops.causal_conv1d(*inputs, reverse=(False, True), **positions)

    assert torch.autograd.gradcheck(run, inputs)
    with torch.no_grad():
        torch.testing.assert_close(run(*inputs), unmerged := run(*(t.detach() for t in inputs)))
    torch.testing.assert_close(run(*inputs).detach(), unmerged)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_registration_flops_and_compilation_of_the_unmerged_convolution(backend):
    inputs, positions = random_inputs(3, 5, 7, 4, 2), random_positions(3, 5, 9)
    operator = torch.ops.mtr_lab.causal_conv1d_unmerged.default
    torch.library.opcheck(operator, (*inputs, *positions, [False, True], backend))
    options = {"reverse": (False, True), "index": positions[0], "source": positions[1]}
    with torch.no_grad(), ops.use_backend(backend):
        with FlopCounterMode(display=False) as counter:
            expected = ops.causal_conv1d(*inputs, **options)
        assert counter.get_total_flops() == 2 * (2 * 4) * (3 * 5 * 7)  # those of the survivors alone
        compiled = torch.compile(ops.causal_conv1d, backend="eager", fullgraph=True)(*inputs, **options)
    assert torch.equal(compiled, expected)


def test_positions_of_other_shapes_are_refused():
    inputs, (index, source) = random_inputs(2, 5, 3, 4, 1), random_positions(2, 5, 9)
    with pytest.raises(UserError, match=r"index \(2, 4\) and source \(2, 9\) do not fit x \(2, 5, 3\)"):
        ops.causal_conv1d(*inputs, index=index[:, :4], source=source)
