"""The gradients of the scan against the autograd of the reference in float64, by relative L2 error."""

import pytest
import torch

pytest.importorskip("triton")

from mtr_lab.ops.gpu.scan_backward import selective_scan_backward
from mtr_lab.ops.selective_scan import selective_scan_reference

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # by Triton's interpreter, as intended
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def random_inputs(
    length=5,
    channels=3,
    states=4,
    reverse=(False, True),
    batch=2,
    without=(),
    dtype=torch.float32,
    weight_dtype=torch.float32,
):
    """All arguments by name; B, C and z are parts of a wider projection, as in the model."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(length + 1000 * channels + 100_000 * states)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    g = len(reverse)
    projected = normal(g, batch, length, 3 + 2 * states)
    inputs = {
        "u": normal(g, batch, length, channels),
        "delta": normal(g, batch, length, channels),
        "A": -torch.exp(normal(g, channels, states)).to(weight_dtype),
        "B": projected[..., 3 : 3 + states],
        "C": projected[..., 3 + states :],
        "D": normal(g, channels, dtype=weight_dtype),
        "z": normal(batch, length, 2 * channels).chunk(2, dim=-1)[1],
        "delta_bias": normal(g, channels, dtype=weight_dtype) - 1,
        "gap": torch.randint(0, 4, (batch, length), generator=generator).to(DEVICE),
        "stretch": 1 + 2 * normal(batch, length, dtype=torch.float32).abs(),
        "reverse": reverse,
        "grad_y": normal(batch, length, channels),
    }
    return inputs | dict.fromkeys(without)


def assert_equal_reference(inputs):
    grads = dict(zip(NAMES, selective_scan_backward(**inputs), strict=True))

    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items() if k != "grad_y"}
    leaves = {k: wide[k].requires_grad_() for k in NAMES if inputs[k] is not None}
    y, _ = selective_scan_reference(**wide, with_stats=False)
    exact = dict(zip(leaves, torch.autograd.grad(y, leaves.values(), inputs["grad_y"].double()), strict=True))
    for name in NAMES:
        if inputs[name] is None:
            assert grads[name] is None
            continue
        assert grads[name].dtype == inputs[name].dtype
        assert grads[name].shape == inputs[name].shape
        assert grads[name].is_contiguous()
        error = (grads[name].double() - exact[name]).norm() / (exact[name].norm() + 1e-30)
        assert error <= TOLERANCE[inputs[name].dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    "sizes",
    [
        {"length": 1, "channels": 1, "states": 1, "batch": 1},
        {"length": 2, "states": 3, "reverse": (True,)},
        {"length": 7, "channels": 35, "states": 16},  # a chunk of 4 tokens and one of 3; 32 channels and 3
        {"length": 9, "channels": 32, "states": 5, "reverse": (False,)},
        {"length": 10, "channels": 9, "states": 64, "batch": 1},
        {"length": 11, "channels": 17, "states": 24, "batch": 1, "reverse": (True, False, True)},
        {"length": 98, "channels": 3, "states": 4, "batch": 1},  # 2 segments of 33 tokens and one of 32
        {"length": 67, "channels": 5, "states": 3, "without": ("z", "gap")},
    ],
)
def test_shapes(sizes):
    assert_equal_reference(random_inputs(**sizes))


@pytest.mark.parametrize(
    "without",
    [
        ("z",),
        ("delta_bias",),
        ("gap",),
        ("stretch",),
        ("gap", "stretch"),
        ("z", "delta_bias", "gap", "stretch"),
    ],
)
def test_optional_inputs(without):
    assert_equal_reference(random_inputs(without=without))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, weight_dtype):
    assert_equal_reference(random_inputs(length=11, channels=5, dtype=dtype, weight_dtype=weight_dtype))


def test_inputs_of_different_dtypes():
    inputs = random_inputs(dtype=torch.bfloat16)
    assert_equal_reference(inputs | {k: inputs[k].float() for k in ("delta", "B", "z")})


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "gap", "stretch", "grad_y"])
def test_any_strides(name):
    inputs = random_inputs(length=3)
    transposed = inputs[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not transposed.is_contiguous()
    assert_equal_reference(inputs | {name: transposed})


@pytest.mark.parametrize("value", [-100.0, -50.0, 50.0, 100.0, 1e30])
def test_extreme_timescales(value):
    inputs = random_inputs(without=("delta_bias",))
    inputs["delta"] = torch.full_like(inputs["delta"], value)
    inputs["u"] = inputs["u"] / max(value, 1)
    assert_equal_reference(inputs)


@pytest.mark.parametrize("value", [-100.0, 100.0, 1e30])
def test_extreme_gates(value):
    inputs = random_inputs()
    inputs["z"] = torch.full_like(inputs["z"], value)
    assert_equal_reference(inputs)


def test_an_image_does_not_depend_on_its_batch_mates():
    inputs = random_inputs(batch=3)
    together = dict(zip(NAMES, selective_scan_backward(**inputs), strict=True))
    alone = {k: inputs[k][:, 1:2] for k in ("u", "delta", "B", "C")}
    alone |= {k: inputs[k][1:2] for k in ("z", "gap", "stretch", "grad_y")}
    single = dict(zip(NAMES, selective_scan_backward(**inputs | alone), strict=True))
    for name in ("u", "delta", "B", "C"):
        assert torch.equal(single[name][:, 0], together[name][:, 1])
    assert torch.equal(single["z"][0], together["z"][1])
