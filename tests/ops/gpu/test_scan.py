"""The forward scan against the reference in float64: odd lengths and widths, strides, dtypes, chunks."""

import pytest
import torch

from mtr_lab import ops
from mtr_lab.ops.gpu import scan
from mtr_lab.ops.gpu.scan import half_width
from mtr_lab.ops.selective_scan import selective_scan_reference

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def inputs(directions, batch, length, channels, states, dtype=torch.float32):
    generator = torch.Generator(torch.get_default_device()).manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    data = {
        "u": normal(directions, batch, length, channels).to(dtype),
        "delta": normal(directions, batch, length, channels).to(dtype),
        "A": -torch.exp(normal(directions, channels, states)),
        # B and C are slices of one projection, z is half of another.
        "B": normal(directions, batch, length, 2 * states + 3).to(dtype)[..., 3 : 3 + states],
        "C": normal(directions, batch, length, 2 * states + 3).to(dtype)[..., 3 + states :],
        "D": normal(directions, channels),
        "z": normal(batch, length, 2 * channels).to(dtype)[..., channels:],
        "delta_bias": normal(directions, channels),
        "gap": torch.randint(0, 4, (batch, length), generator=generator),
        "stretch": 1 + normal(batch, length).abs(),
    }
    data["gap"][:, 0] = 0
    return data


def check(data, reverse, dtype):
    with ops.use_backend("triton"):
        y, sums = ops.selective_scan(**data, reverse=reverse, stats=ops.STATS)
    exact = {k: t.double() if t is not None and t.is_floating_point() else t for k, t in data.items()}
    expected, expected_sums = selective_scan_reference(**exact, reverse=reverse, with_stats=True)
    assert y.dtype == dtype
    assert sums.dtype == torch.float32
    assert relative(y, expected) < TOLERANCE[dtype]
    assert relative(sums, expected_sums) < 1e-5


@pytest.fixture
def whole(monkeypatch):
    """The form for many images, which is that of any directions."""
    monkeypatch.setattr(scan, "half_width", lambda *_: 0)


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("reverse", [(False,), (True,), (False, True), (True, False, False)])
@pytest.mark.parametrize(("length", "channels", "states"), [(1, 32, 16), (7, 40, 5), (19, 33, 1)])
def test_equals_the_reference(reverse, length, channels, states):
    data = inputs(len(reverse), 2, length, channels, states)
    check(data, reverse, torch.float32)


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("reverse", [(False, True), (True, False)])
@pytest.mark.parametrize(
    ("length", "channels", "states"), [(1, 32, 16), (7, 40, 5), (16, 20, 1), (19, 33, 2), (35, 16, 16)]
)
def test_two_directions_meet_in_the_middle(reverse, length, channels, states, width, monkeypatch):
    launched = []
    kernel = scan._scan_half
    half = type("", (), {"__getitem__": lambda _, grid: launched.append(grid) or kernel[grid]})()
    monkeypatch.setattr(scan, "_scan_half", half)
    monkeypatch.setattr(scan, "half_width", lambda *_: width)
    check(inputs(2, 2, length, channels, states), reverse, torch.float32)
    assert launched == [(-(-channels // width), 2, 2)] * 2


@pytest.mark.parametrize("reverse", [(False,), (False, False), (True, True), (True, False, True)])
def test_other_directions_do_not(reverse, monkeypatch):
    monkeypatch.setattr(scan, "_scan_half", None)
    monkeypatch.setattr(scan, "half_width", lambda *_: 16)
    check(inputs(len(reverse), 1, 9, 16, 4), reverse, torch.float32)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("without", [["z"], ["delta_bias", "gap"], ["gap"], ["stretch"], ["z", "gap", "stretch"]])
def test_every_optional_input_may_be_absent(without):
    data = inputs(2, 1, 9, 36, 16) | dict.fromkeys(without)
    check(data, (False, True), torch.float32)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_state_in_float32(dtype):
    check(inputs(2, 1, 21, 32, 16, dtype), (False, True), dtype)


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("length", [33, 50])
@pytest.mark.parametrize("without", [[], ["gap"]])
def test_a_split_sequence_gives_the_same(length, without, monkeypatch):
    monkeypatch.setattr(scan, "MIN_CHUNK", 8)
    monkeypatch.setattr(scan, "fill", lambda device: 100)
    assert 8 <= scan.chunk_length(length, 4, torch.get_default_device()) < length
    check(inputs(2, 2, length, 8, 4) | dict.fromkeys(without), (False, True), torch.float32)


def test_extreme_timescales():
    data = inputs(1, 1, 6, 32, 4)
    data["delta"] = torch.tensor([-200.0, -60.0, -15.0, 15.0, 60.0, 200.0])[None, None, :, None].expand(1, 1, 6, 32)
    check(data, (False,), torch.float32)


def test_softplus_is_accurate_over_the_whole_range():
    data = inputs(1, 1, 400, 1, 1)
    data["delta"] = torch.linspace(-40, 40, 400)[None, None, :, None]
    with ops.use_backend("triton"):
        _, sums = ops.selective_scan(**data | {"stretch": None, "delta_bias": None}, stats=("delta",))
    exact = torch.nn.functional.softplus(data["delta"].double())
    torch.testing.assert_close(sums.double(), exact, rtol=4e-6, atol=0)


@pytest.mark.parametrize(
    ("length", "warps", "expected"),
    [(197, 10**6, 197), (197, 1, 28), (16384, 1, 2048), (12, 1, 12), (20, 1, 12), (4097, 1, 516), (4097, 2, 4097)],
)
def test_only_what_would_leave_the_gpu_idle_is_split(length, warps, expected, monkeypatch):
    monkeypatch.setattr(scan, "fill", lambda device: 8)
    assert scan.chunk_length(length, warps, torch.device("cpu")) == expected


@pytest.mark.parametrize(
    ("images", "channels", "expected"),
    [
        (2, 768, 0),
        (3, 768, 16),
        (2, 1000, 0),
        (8, 768, 16),
        (21, 768, 16),
        (22, 768, 32),
        (109, 768, 32),
        (110, 768, 0),
    ],
)
def test_few_images_are_scanned_in_halves(images, channels, expected, monkeypatch):
    monkeypatch.setattr(scan, "processors", lambda device: 132)
    assert half_width(images, channels, torch.device("cuda")) == expected
