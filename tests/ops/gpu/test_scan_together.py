"""The scan of few images in one launch, against the reference in float64."""

import pytest
import torch
from covering import parametrize_covering
from test_scan import TOLERANCE, inputs, relative

from mtr_lab import ops
from mtr_lab.ops.gpu import scan, scan_together
from mtr_lab.ops.gpu.scan_together import fits_together
from mtr_lab.ops.scan_inputs import ScanInputs
from mtr_lab.ops.scan_reference import selective_scan_reference


def check(data, reverse, dtype, monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return scan_together.scan_together(*arguments)

    monkeypatch.setattr(scan, "fits_together", lambda *_: True)
    monkeypatch.setattr(scan, "scan_together", counted)
    with ops.use_backend("triton"):
        y, sums = ops.selective_scan(**data, reverse=reverse)
    exact = {k: t.double() if t is not None and t.is_floating_point() else t for k, t in data.items()}
    expected, _ = selective_scan_reference(ScanInputs(**exact, reverse=reverse), ())
    assert len(calls) == 1
    assert y.dtype == dtype
    assert sums.shape == (*data["u"].shape[:3], 0)
    assert relative(y, expected) < TOLERANCE[dtype]


@parametrize_covering(
    sizes=[(1, 1, 9, 16), (3, 2, 20, 1), (1, 7, 8, 4), (2, 33, 13, 8), (1, 118, 6, 16), (3, 19, 17, 5)],
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    reverse=[(False, True), (True, False), (True,), (False, False, True)],
    gate=[True, False],
    gap=[True, False],
    factor=[None, "delta_scale", "repeats"],
)
def test_options(sizes, dtype, reverse, gate, gap, factor, monkeypatch):
    batch, length, channels, states = sizes
    data = inputs(len(reverse), batch, length, channels, states, dtype)
    scales = {
        "delta_scale": data["delta_scale"],
        "repeats": torch.arange(float(batch * length)).view(batch, length) % 5 + 1,
    }
    data |= {"z": data["z"] if gate else None, "gap": data["gap"] if gap else None}
    data |= {name: scales[name] if name == factor else None for name in scales}
    check(data, reverse, dtype, monkeypatch)


@pytest.mark.parametrize("tiles", [(4, 8, 8, 2), (32, 8, 2, 7), (16, 16, 4, 1)], ids=str)
def test_tiles(tiles, monkeypatch):
    for name, value in zip(("CHANNELS", "STATES", "CHUNKS", "UNROLL"), tiles, strict=True):
        monkeypatch.setattr(scan_together, name, value)
    check(inputs(2, 1, 21, 40, 16) | {"delta_scale": None}, (False, True), torch.float32, monkeypatch)


@pytest.mark.parametrize(
    ("length", "parts", "expected"), [(197, 32, (16, 16)), (1, 4, (8, 1)), (197, 512, (1, 16)), (5, 64, (8, 16))]
)
def test_chunks_fill_warps_and_leave_room_for_registers(length, parts, expected):
    assert scan_together.chunks_and_warps(length, parts) == expected


def test_statistics_orders_and_saved_states_use_another_form(monkeypatch):
    monkeypatch.setattr(scan, "fits_together", lambda *_: True)
    monkeypatch.setattr(scan, "scan_together", lambda *_: pytest.fail("used"))
    data = inputs(2, 1, 5, 20, 3)
    order = torch.arange(5).repeat(2, 1, 1)
    with ops.use_backend("triton"):
        ops.selective_scan(**data, reverse=(False, True), stats=("output",))
        ops.selective_scan(**data, order=order, reverse=(False, False))


@pytest.mark.parametrize(
    ("sizes", "fits"),  # directions, images, tokens, channels, states
    [
        ((2, 1, 197, 768, 16), True),
        ((2, 2, 197, 384, 16), True),
        ((2, 2, 197, 768, 16), False),
        ((2, 1, 1025, 768, 16), False),
        ((4, 1, 197, 768, 16), False),
    ],
)
def test_only_short_sequences_of_few_images_fit(sizes, fits, monkeypatch):
    monkeypatch.setattr(scan_together, "num_sms", lambda device: 132)
    assert fits_together(*sizes, torch.device("cuda")) == fits
