"""The forward scan against the reference in float64: odd lengths and widths, strides, dtypes, chunks."""

import pytest
import torch
from covering import parametrize_covering
from new_statistics import NEW
from paths import reading, some_cells

from mtr_lab import ops
from mtr_lab.ops.gpu import scan, scan_chunks
from mtr_lab.ops.gpu.scan import half_width
from mtr_lab.ops.scan_inputs import ScanInputs
from mtr_lab.ops.scan_reference import selective_scan_reference
from mtr_lab.ops.statistics import STATISTICS

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


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
        "gap": torch.randint(0, 4, (batch, directions, length), generator=generator),
        "delta_scale": 1 + normal(batch, length).abs(),
    }
    data["gap"][..., 0] = 0
    return data


def along(paths, batch, length):
    """Order and gaps of random tokens along these paths over a grid."""
    cells = some_cells(batch, length, 2 * length + 3, torch.Generator(torch.get_default_device()).manual_seed(0))
    order, gap = reading(paths, cells, 2 * length + 3)
    return {"order": order.to(torch.get_default_device()), "gap": gap.to(torch.get_default_device())}


def check(data, reverse, dtype, stats=ops.STATS):
    with ops.use_backend("triton"):
        y, sums = ops.selective_scan(**data, reverse=reverse, stats=stats)
    exact = {k: t.double() if t is not None and t.is_floating_point() else t for k, t in data.items()}
    expected, expected_sums = selective_scan_reference(ScanInputs(**exact, reverse=reverse), stats)
    assert y.dtype == dtype
    assert sums.dtype == torch.float32
    assert relative(y, expected) < TOLERANCE[dtype]
    assert relative(sums, expected_sums) < 1e-5


@pytest.fixture
def launched(monkeypatch):
    """The names of the launched kernels, and the first dimension of their grids."""
    launches = []

    class Kernel:
        def __init__(self, module, name):
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid):
            launches.append((self.name, grid[0]))
            return self.kernel[grid]

    for module, name in ((scan, "_scan"), (scan, "_scan_half"), (scan_chunks, "_chunk_states")):
        monkeypatch.setattr(module, name, Kernel(module, name))
    return launches


def launches_of(form, length, channels, apart=1):
    """``apart``: the launches of a scan in chunks, one for each direction with an order."""
    if isinstance(form, int):
        return [("_scan_half", -(-channels // form))] * 2
    blocks = -(-channels // scan.CHANNELS)
    if form == "whole" or length <= 8:
        return [("_scan", blocks)]
    return [("_chunk_states", blocks)] + [("_scan", blocks)] * apart


@pytest.mark.parametrize(
    ("form", "dtype", "reverse", "length", "channels"),
    [
        ("whole", torch.float32, (False, True, False), 7, 70),
        ("chunks", torch.float16, (True, False), 15, 70),
        (16, torch.bfloat16, (False, True), 19, 35),
        (32, torch.float32, (True, False), 19, 35),
    ],
    indirect=["form"],
)
def test_every_form(form, dtype, reverse, length, channels, launched):
    check(inputs(len(reverse), 2, length, channels, 3, dtype), reverse, dtype)
    assert launched == launches_of(form, length, channels)


@pytest.mark.parametrize(
    ("form", "dtype", "paths", "length", "channels"),
    [
        ("whole", torch.float32, ("snake", "-snake", "columns", "-columns"), 7, 64),
        ("chunks", torch.bfloat16, ("columns", "snake"), 15, 70),
    ],
    indirect=["form"],
)
def test_orders(form, dtype, paths, length, channels, launched):
    data = inputs(len(paths), 2, length, channels, 3, dtype) | along(paths, 2, length)
    check(data, [0] * len(paths), dtype)
    assert launched == launches_of(form, length, channels, len(paths))


@pytest.mark.parametrize("stats", [("output",), ("absolute", "write", "taken")])
def test_the_statistics_asked_for(stats, monkeypatch):
    for name, statistic in NEW.items():
        monkeypatch.setitem(STATISTICS, name, statistic)
    check(inputs(2, 1, 5, 20, 3), (False, True), torch.float32, stats)


def test_nothing_optional():
    data = inputs(1, 1, 5, 20, 3) | dict.fromkeys(["z", "delta_bias", "gap", "delta_scale"])
    check(data, (True,), torch.float32)


@pytest.mark.slow
@parametrize_covering(
    form=["whole", "chunks", 16, 32],
    sizes=[(1, 70, 16), (9, 40, 5), (16, 64, 1), (22, 17, 2)],
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    paths=[("rows", "-rows"), ("-rows", "rows"), ("snake", "columns"), ("columns", "-rows", "snake")],
    gate=[True, False],
    bias=[True, False],
    gap=[True, False],
    delta_scale=[True, False],
    indirect=["form"],
)
def test_options(form, sizes, dtype, paths, gate, bias, gap, delta_scale, launched):
    present = {"z": gate, "delta_bias": bias, "gap": gap, "delta_scale": delta_scale}
    absent = [name for name, given in present.items() if not given]
    data, raster = inputs(len(paths), 2, *sizes, dtype), {*paths} == {"rows", "-rows"}
    if not raster:
        data |= along(paths, 2, sizes[0])
    check(data | dict.fromkeys(absent), [raster and path == "-rows" for path in paths], dtype)
    form = form if raster or form == "chunks" else "whole"
    assert launched == launches_of(form, *sizes[:2], 1 if raster else len(paths))


@pytest.mark.parametrize("form", ["whole", 16, "chunks"], indirect=True)
@pytest.mark.usefixtures("form")
def test_repeats():
    """Of tokens whose timescales reach from 0 to those that forget every token at once."""
    data = inputs(2, 2, 9, 20, 3, torch.float32) | {
        "delta_scale": None,
        "repeats": torch.arange(18.0).view(2, 9) % 5 + 1,
    }
    data["delta"] = 10 * data["delta"] - 8
    check(data, (False, True), torch.float32)
    if torch.cuda.is_available():  # slow under the interpreter
        check(data | along(("snake", "columns"), 2, 9), (False, False), torch.float32)


@pytest.mark.parametrize("form", [16, "chunks"], indirect=True)
@pytest.mark.parametrize("reverse", [(False,), (True,), (False, False), (True, True), (True, False, True)])
def test_only_two_opposite_directions_meet_in_the_middle(form, reverse, launched):
    check(inputs(len(reverse), 1, 9, 16, 4), reverse, torch.float32)
    assert launched == launches_of("chunks" if form == "chunks" else "whole", 9, 16)


def test_extreme_timescales():
    data = inputs(1, 1, 6, 32, 4)
    data["delta"] = torch.tensor([-200.0, -60.0, -15.0, 15.0, 60.0, 200.0])[None, None, :, None].expand(1, 1, 6, 32)
    check(data, (False,), torch.float32)


def test_softplus_is_accurate_over_the_whole_range():
    delta = torch.linspace(-40, 40, 400)[None, None, None]
    one = torch.ones(1, 1, 1, 1)
    with ops.use_backend("triton"):  # after one token with u, B and C of 1, y is Δ
        y, _ = ops.selective_scan(
            torch.ones(1, 1, 1, 400), delta, -torch.ones(1, 400, 1), one, one, torch.zeros(1, 400)
        )
    torch.testing.assert_close(y.double(), torch.nn.functional.softplus(delta[0].double()), rtol=4e-6, atol=0)


@pytest.mark.parametrize(
    ("length", "warps", "expected"),
    [(197, 10**6, 197), (197, 1, 28), (16384, 1, 2048), (12, 1, 12), (20, 1, 12), (4097, 1, 516), (4097, 2, 4097)],
)
def test_only_batches_that_leave_the_gpu_idle_are_split(length, warps, expected, monkeypatch):
    monkeypatch.setattr(scan_chunks, "resident_warps", lambda device: 8)
    assert scan_chunks.chunk_length(length, warps, torch.device("cpu")) == expected


@pytest.mark.parametrize(
    ("images", "channels", "expected"),
    [
        (2, 768, None),
        (3, 768, 16),
        (2, 1000, None),
        (8, 768, 16),
        (21, 768, 16),
        (22, 768, 32),
        (109, 768, 32),
        (110, 768, None),
    ],
)
def test_few_images_are_scanned_in_halves(images, channels, expected, monkeypatch):
    monkeypatch.setattr(scan, "num_sms", lambda device: 132)
    assert half_width(images, channels, torch.device("cuda")) == expected
