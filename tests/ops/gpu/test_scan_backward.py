"""The gradients of the scan against the autograd of the reference in float64, by relative L2 error."""

import pytest
import torch

pytest.importorskip("triton")

from covering import parametrize_covering
from paths import reading, some_cells

from mtr_lab.ops.gpu import scan_backward
from mtr_lab.ops.gpu.scan_backward import selective_scan_backward
from mtr_lab.ops.scan_inputs import ScanInputs
from mtr_lab.ops.scan_reference import selective_scan_reference

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # by Triton's interpreter, as intended
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def random_inputs(
    length=5,
    channels=3,
    states=4,
    paths=("rows", "-rows"),
    batch=2,
    without=(),
    dtype=torch.float32,
    weight_dtype=torch.float32,
):
    """All arguments by name; B, C and z are parts of a wider projection, as in the model."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(length + 1000 * channels + 100_000 * states)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    g = len(paths)
    cells = some_cells(batch, length, 2 * length + 3, torch.Generator(torch.get_default_device()).manual_seed(0))
    order, gap = (t.to(DEVICE) for t in reading(paths, cells, 2 * length + 3))
    raster = {*paths} <= {"rows", "-rows"}
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
        "order": None if raster else order,
        "gap": gap,
        "delta_scale": 1 + 2 * normal(batch, length, dtype=torch.float32).abs(),
        "reverse": tuple(int(raster and path == "-rows") for path in paths),
        "grad_y": normal(batch, length, channels),
    }
    return inputs | dict.fromkeys(without)


def gradients(grad_y, **inputs):
    return selective_scan_backward(ScanInputs(**inputs), grad_y)


def assert_equal_reference(inputs):
    grads = dict(zip(NAMES, gradients(**inputs), strict=True))

    wide = {
        k: v.double() if isinstance(v, torch.Tensor) and k != "order" else v for k, v in inputs.items() if k != "grad_y"
    }
    leaves = {k: wide[k].requires_grad_() for k in NAMES if inputs[k] is not None}
    y, _ = selective_scan_reference(ScanInputs(**wide), stats=())
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


@pytest.fixture
def segments(request, monkeypatch):
    """At most this many segments for 13 tokens: 3, of which the last is shorter, or 1."""
    monkeypatch.setattr(scan_backward, "MIN_SEGMENT", 13 // request.param)
    monkeypatch.setattr(scan_backward, "resident_warps", lambda device: 100)


@pytest.mark.parametrize(
    ("segments", "sizes"),
    [
        (1, {"length": 7, "channels": 35, "states": 3}),  # a chunk of 4 tokens and one of 3; 32 channels and 3
        (3, {"length": 13, "paths": ("-rows", "rows"), "dtype": torch.bfloat16, "weight_dtype": torch.bfloat16}),
        (1, {"length": 5, "paths": ("-rows", "rows", "-rows"), "dtype": torch.float16}),
        (3, {"length": 13, "paths": ("rows",), "batch": 1, "without": ("z", "delta_bias", "gap", "delta_scale")}),
        (3, {"length": 13, "paths": ("snake", "-columns")}),
    ],
    indirect=["segments"],
)
@pytest.mark.usefixtures("segments")
def test_all_inputs_or_none(sizes):
    assert_equal_reference(random_inputs(**sizes))


@pytest.mark.slow
@parametrize_covering(
    segments=[1, 3],
    sizes=[(1, 1, 1), (7, 35, 16), (10, 9, 64), (13, 17, 24)],  # 1 to 4 chunks; 32, 8 and 16 channels a program
    paths=[("rows", "-rows"), ("-rows",), ("rows",), ("columns", "-snake")],
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    weight_dtype=[torch.float32, torch.bfloat16],
    batch=[1, 2],
    gate=[True, False],
    bias=[True, False],
    gap=[True, False],
    delta_scale=[True, False],
    indirect=["segments"],
)
@pytest.mark.usefixtures("segments")
def test_options(sizes, paths, dtype, weight_dtype, batch, gate, bias, gap, delta_scale):
    present = {"z": gate, "delta_bias": bias, "gap": gap, "delta_scale": delta_scale}
    absent = [name for name, given in present.items() if not given]
    assert_equal_reference(random_inputs(*sizes, paths, batch, absent, dtype, weight_dtype))


@pytest.mark.slow
def test_segments_of_a_long_sequence():
    assert_equal_reference(random_inputs(67, batch=1))


def test_inputs_of_different_dtypes():
    inputs = random_inputs(dtype=torch.bfloat16)
    assert_equal_reference(inputs | {k: inputs[k].float() for k in ("delta", "B", "z")})


@pytest.mark.parametrize(
    "names",
    [
        ("u", "A", "B", "D", "z", "gap"),
        ("delta", "C", "delta_bias", "order", "delta_scale", "grad_y"),
    ],  # all of different shapes
)
def test_any_strides(names):
    inputs = random_inputs(length=3, paths=("snake", "columns"))
    transposed = {name: inputs[name].transpose(-1, -2).contiguous().transpose(-1, -2) for name in names}
    assert not any(tensor.is_contiguous() for tensor in transposed.values())
    assert_equal_reference(inputs | transposed)


@pytest.mark.parametrize("value", [-100.0, -50.0, 50.0, 100.0, 1e30])
def test_extreme_timescales(value):
    inputs = random_inputs(length=3, batch=1, without=("delta_bias",))
    inputs["delta"] = torch.full_like(inputs["delta"], value)
    inputs["u"] = inputs["u"] / max(value, 1)
    assert_equal_reference(inputs)


@pytest.mark.parametrize("value", [-100.0, 100.0, 1e30])
def test_extreme_gates(value):
    inputs = random_inputs(length=3, batch=1)
    inputs["z"] = torch.full_like(inputs["z"], value)
    assert_equal_reference(inputs)


def test_an_image_does_not_depend_on_its_batch_mates():
    inputs = random_inputs(batch=3)
    together = dict(zip(NAMES, gradients(**inputs), strict=True))
    alone = {k: inputs[k][:, 1:2] for k in ("u", "delta", "B", "C")}
    alone |= {k: inputs[k][1:2] for k in ("z", "gap", "delta_scale", "grad_y")}
    single = dict(zip(NAMES, gradients(**inputs | alone), strict=True))
    for name in ("u", "delta", "B", "C"):
        assert torch.equal(single[name][:, 0], together[name][:, 1])
    assert torch.equal(single["z"][0], together["z"][1])
