"""First and second derivatives of the operations, for every implementation of the forward pass."""

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from paths import reading, some_cells
from torch.autograd import gradcheck

from mtr_lab import ops
from mtr_lab.errors import UserError
from mtr_lab.ops.convolution import causal_conv1d_reference
from mtr_lab.ops.scan import SELECTIVE_SCAN
from mtr_lab.ops.scan_gradient import SELECTIVE_SCAN_BACKWARD
from mtr_lab.ops.scan_inputs import ScanInputs
from mtr_lab.ops.scan_reference import selective_scan_backward_reference, selective_scan_reference

ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


# The second derivatives along random directions: entry by entry, they take four fifths of the time of this file.
gradgradcheck = partial(torch.autograd.gradgradcheck, fast_mode=True)


def scan_inputs(directions: int, length: int) -> dict[str, torch.Tensor | None]:
    images, channels, states = 2, 3, 2
    tokens, projections = (directions, images, length, channels), (directions, images, length, states)
    gap = torch.arange(images * directions * length).reshape(images, directions, length) % 3
    gap[..., 0] = 0
    return {
        "u": normal(*tokens),
        "delta": normal(*tokens, seed=1),
        "A": -normal(directions, channels, states).exp(),
        "B": normal(*projections),
        "C": normal(*projections, seed=1),
        "D": normal(directions, channels),
        "z": normal(images, length, channels),
        "delta_bias": normal(directions, channels, seed=1),
        "gap": gap,
        "delta_scale": 1 + normal(images, length).abs(),
        "repeats": None,
    }


def repeating(data: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """The inputs with tokens that are repeated instead of scaled."""
    return data | {"repeats": 1 + torch.arange(data["delta_scale"].numel()).view(2, -1) % 3, "delta_scale": None}


@pytest.mark.parametrize("name", ["reference", "portable"])
@pytest.mark.parametrize(
    ("reverse", "length", "absent"),
    [
        ((True, False), 5, ()),
        ((False, True, True), 4, ("z", "gap")),
        ((False,), 1, ("delta_bias", "gap")),
        ((True,), 3, ("delta_scale",)),
    ],
)
def test_scan(reverse, length, absent, name):
    data = scan_inputs(len(reverse), length) | dict.fromkeys(absent)
    present = [argument for argument in ARGUMENTS if data[argument] is not None]

    def scan(*tensors):
        return ops.selective_scan(**data | dict(zip(present, tensors, strict=True)), reverse=reverse)[0]

    inputs = [data[argument].requires_grad_() for argument in present]
    with ops.use_backend(name):
        assert gradcheck(scan, inputs)
        assert gradgradcheck(scan, inputs)


@pytest.mark.parametrize("name", ["reference", "portable"])
def test_scan_of_repeated_tokens(name):
    data = repeating(scan_inputs(2, 4))

    def scan(*tensors):
        return ops.selective_scan(**data | dict(zip(ARGUMENTS, tensors, strict=True)), reverse=(False, True))[0]

    inputs = [data[argument].requires_grad_() for argument in ARGUMENTS]
    with ops.use_backend(name):
        assert gradcheck(scan, inputs)
        assert gradgradcheck(scan, inputs)


def test_gradients_of_repeated_tokens_are_finite_for_timescales_of_zero():
    data = {
        k: t.float() if t is not None and t.is_floating_point() else t for k, t in repeating(scan_inputs(1, 4)).items()
    }
    data["delta"][:, :, ::2] = -1000.0
    leaves = [data[argument].requires_grad_() for argument in ARGUMENTS]
    grads = torch.autograd.grad(ops.selective_scan(**data)[0].sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", ["reference", "portable"])
@pytest.mark.parametrize("paths", [("columns",), ("snake", "-columns"), ("snake", "-snake", "columns", "-columns")])
def test_scan_along_paths(paths, name):
    generator = torch.Generator().manual_seed(0)
    order, gap = reading(paths, some_cells(2, 3, 9, generator), 9)
    data = scan_inputs(len(paths), 3) | {"order": order, "gap": gap}

    def scan(*tensors):
        return ops.selective_scan(**data | dict(zip(ARGUMENTS, tensors, strict=True)))[0]

    inputs = [data[argument].requires_grad_() for argument in ARGUMENTS]
    with ops.use_backend(name):
        assert gradcheck(scan, inputs)
        assert gradgradcheck(scan, inputs)


def test_convolution():
    inputs = [t.requires_grad_() for t in (normal(2, 5, 3), normal(2, 3, 4), normal(2, 3))]
    for reverse in ((False, True), (True, True)):
        assert gradcheck(lambda *args, r=reverse: ops.causal_conv1d(*args, reverse=r), inputs)
        assert gradgradcheck(lambda *args, r=reverse: ops.causal_conv1d(*args, reverse=r), inputs)


@pytest.mark.parametrize("residual", [None, normal(2, 5, 3, seed=2)])
def test_norm_with_a_plan(residual):
    dest = torch.tensor([[0, 1, 0, 2, -1], [-1, 0, 1, 1, 2]])
    keep, removed = torch.tensor([[0, 1, 3], [1, 2, 4]]), torch.tensor([[2, 4], [0, 3]])

    def reduced(hidden, share, weight, *residual):
        plan = ops.Plan(dest, share.softmax(1), keep, removed)
        return ops.rms_norm_add(hidden, *(residual or [None]), weight, plan=plan)

    inputs = [normal(2, 5, 3), normal(2, 5), normal(3), *([] if residual is None else [residual])]
    inputs = [t.requires_grad_() for t in inputs]
    assert gradcheck(reduced, inputs)
    assert gradgradcheck(reduced, inputs)


def test_third_derivatives():
    x, weight, bias = normal(1, 4, 2).requires_grad_(), normal(1, 2, 3), normal(1, 2)
    actual = []
    for function in (ops.causal_conv1d, lambda *args: causal_conv1d_reference(*args, [0])):
        value = function(x, weight, bias)
        for _ in range(3):
            (value,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
        actual.append(value)
    torch.testing.assert_close(*actual)


def test_arguments_that_depend_on_each_other_keep_their_gradients_apart():
    x, weight, bias = normal(1, 4, 2), normal(1, 2, 3), normal(1, 2)

    def function(x):
        return ops.causal_conv1d(x.sin(), weight + x.mean(), bias).cos()

    assert gradgradcheck(function, (x.requires_grad_(),))


@pytest.mark.parametrize("name", ["reference", "portable"])
def test_registration_of_the_gradients(name):
    data = scan_inputs(2, 3)
    inputs = [data[argument].mT.contiguous().mT.requires_grad_() for argument in ARGUMENTS]  # of other strides
    gap, delta_scale, grad = data["gap"], data["delta_scale"], normal(2, 3, 3)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    operator = torch.ops.mtr_lab.selective_scan_backward.default
    torch.library.opcheck(operator, (*inputs, None, gap, delta_scale, None, [1, 0], grad, name), test_utils=checks)
    conv = [t.mT.contiguous().mT.requires_grad_() for t in (normal(2, 5, 3), normal(2, 3, 4), normal(2, 3))]
    operator = torch.ops.mtr_lab.causal_conv1d_backward.default
    torch.library.opcheck(operator, (*conv, [0, 1], normal(2, 2, 5, 3), "reference"), test_utils=checks)


def test_forward_mode():
    x, weight, bias = normal(1, 4, 2), normal(1, 2, 3), normal(1, 2)
    start = scan_inputs(1, 4)["u"]
    for function, at in (
        (lambda x: ops.causal_conv1d(x, weight, bias), x),
        (lambda u: ops.selective_scan(**scan_inputs(1, 4) | {"u": u})[0], start),
    ):
        direction = normal(*at.shape, seed=5)
        _, tangent = torch.func.jvp(function, (at,), (direction,))
        expected = (function(at + 1e-6 * direction) - function(at - 1e-6 * direction)) / 2e-6
        torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_a_hessian_of_one_argument_alone(argument):
    data = scan_inputs(1, 3)

    def total(value):
        return ops.selective_scan(**data | {argument: value})[0].sum()

    def total_of_reference(value):
        return selective_scan_reference(ScanInputs(**data | {argument: value}), stats=())[0].sum()

    actual, expected = (torch.func.hessian(f)(data[argument]) for f in (total, total_of_reference))
    torch.testing.assert_close(actual, expected)
    actual = torch.autograd.functional.hessian(total, data[argument])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("delta", normal(1, 2, 2, 3)),
        ("A", normal(1, 1, 2)),
        ("B", normal(1, 2, 3, 1)),
        ("D", normal(3)),
        ("z", normal(2, 2, 3)),
        ("gap", torch.zeros(2, 3)),
        ("gap", torch.zeros(2, 2, 3)),
        ("order", torch.zeros(2, 3, dtype=torch.int64)),
        ("order", torch.zeros(1, 2, 3)),
        ("delta_scale", torch.ones(2, 2)),
        ("repeats", torch.ones(2, 2)),
        ("reverse", (False, True)),
        ("u", normal(2, 3, 3)),
        ("u", normal(1, 2, 0, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, value):
    with pytest.raises(UserError, match=rf"selective_scan: .*{name}"):
        ops.selective_scan(**scan_inputs(1, 3) | {name: value})
    with pytest.raises(UserError, match="causal_conv1d: x .* do not fit"):
        ops.causal_conv1d(normal(2, 5, 3), normal(2, 3, 4), normal(2, 3))  # reverse is of one direction


def test_an_order_and_a_reversed_direction_exclude_each_other():
    with pytest.raises(UserError, match=r"reverse=\(1,\) with an order, expected all 0"):
        ops.selective_scan(**scan_inputs(1, 3), order=torch.arange(3).expand(1, 2, 3), reverse=(True,))


def test_what_has_no_gradient_is_refused():
    data = scan_inputs(1, 3)
    with pytest.raises(UserError, match="got repeats and delta_scale, expected one of them"):
        ops.selective_scan(**data | {"repeats": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="no gradient of gap, delta_scale and repeats"):
        ops.selective_scan(**data | {"delta_scale": data["delta_scale"].requires_grad_()})
    data = scan_inputs(1, 3)
    y, sums = ops.selective_scan(**data | {"u": data["u"].requires_grad_()}, stats=("delta",))
    assert y.requires_grad
    assert not sums.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_portable_scan_equals_the_loop(dtype):
    for length, reverse in itertools.product((1, 2, 7, 33), ((False,), (True, False))):
        data = scan_inputs(len(reverse), length)
        half = {k: t if t is None or not t.is_floating_point() else t.to(dtype) for k, t in data.items()}
        actual, expected = [], []
        for name, results in (("portable", actual), ("reference", expected)):
            with ops.use_backend(name):
                results += ops.selective_scan(**half, reverse=reverse, stats=ops.STATS)
        for one, other in zip(actual, expected, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "absent", "ordered"),
    [(70, (), False), (128, ("z", "delta_scale"), True), (3, ("delta_bias", "gap"), False)],
)
def test_the_cpu_kernel_of_the_gradients_equals_plain_pytorch(channels, absent, ordered):
    directions, images, length, states = 2, 3, 17, 5
    tokens, projections = (directions, images, length, channels), (directions, images, length, states)
    gap = torch.arange(images * directions * length).reshape(images, directions, length) % 3
    order = torch.stack([torch.randperm(length) for _ in range(directions * images)]).view(directions, images, length)
    data = {
        "u": normal(*tokens),
        "delta": normal(*tokens, seed=1),
        "A": -normal(directions, channels, states).exp(),
        "B": normal(*projections),
        "C": normal(*projections, seed=1),
        "D": normal(directions, channels),
        "z": normal(images, length, channels),
        "delta_bias": normal(directions, channels, seed=1),
        "order": order if ordered else None,
        "gap": gap.double(),
        "delta_scale": 1 + normal(images, length).abs(),
        "repeats": None,
        "reverse": (0, 0) if ordered else (0, 1),
    } | dict.fromkeys(absent)
    exact = ScanInputs(**data)
    single = exact._replace(
        **{k: t.float() for k, t in data.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    )
    grad = normal(images, length, channels, seed=2)
    assert SELECTIVE_SCAN_BACKWARD.pick(*single, grad.float()).name == "cpu"
    expected = selective_scan_backward_reference(exact, grad)
    for one, other in zip(SELECTIVE_SCAN_BACKWARD(*single, grad.float()), expected, strict=True):
        if other is None:
            assert one.numel() == 0
        else:
            assert (one - other).abs().max() < 2e-6 * other.abs().max()


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_devices_take_the_portable_scan(device):
    elsewhere = SimpleNamespace(device=torch.device(device), dtype=torch.float32)
    inputs = *ScanInputs(elsewhere, *[None] * 5), None
    assert SELECTIVE_SCAN.pick(*inputs).name == SELECTIVE_SCAN_BACKWARD.pick(*inputs).name == "portable"
    with ops.use_backend("reference"):
        assert SELECTIVE_SCAN.pick(*inputs).name == SELECTIVE_SCAN_BACKWARD.pick(*inputs).name == "reference"
