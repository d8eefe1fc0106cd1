"""Convolution with x_proj and a scan that computes Δ, as large batches run them, against the composition in float64."""

import pytest
import torch

from mtr_lab import ops
from mtr_lab.ops.gpu import project, scan, scan_chunks

WIDTH = 4
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def _large(monkeypatch):
    """Any batch is large."""
    monkeypatch.setattr(project, "FUSED", 0)
    monkeypatch.setattr(scan, "half_width", lambda *_: None)
    monkeypatch.setattr(scan_chunks, "MIN_ROOM", 10**9)


def inputs(directions, images, length, channels, rank, states, dtype):
    generator = torch.Generator(torch.get_default_device()).manual_seed(channels)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    weights = [
        normal(directions, channels, 1, WIDTH), normal(directions, channels),
        normal(directions, rank + 2 * states, channels) * channels**-0.5, normal(directions, channels, rank),
        normal(directions, channels) - 2, normal(directions, channels, states), normal(directions, channels),
    ]  # fmt: skip
    tokens = {
        "gap": torch.randint(0, 3, (images, directions, length), generator=generator).index_fill(2, torch.tensor(0), 0),
        "delta_scale": 1 + normal(images, length).abs(),
        "repeats": torch.randint(1, 4, (images, length), generator=generator).float(),
        "index": torch.arange(length).expand(images, -1) * 2 + 1,
        "source": torch.randint(-1, length, (images, 2 * length + 3), generator=generator),
    }
    xz = normal(images, length, 2 * channels).to(dtype)
    return xz, ops.MambaWeights(*(w.to(dtype) for w in weights)), tokens


def check(sizes, reverse, dtype, extra=(), stats=()):
    xz, weights, tokens = inputs(len(reverse), *sizes, dtype)
    options = {"reverse": reverse, "stats": stats, "scale": 0.5} | {name: tokens[name] for name in extra}
    with torch.no_grad():
        with ops.use_backend("triton"):
            y, sums, b, c = ops.mamba_inner(xz, weights, **options)
        wide = {k: t.double() if k in ("delta_scale", "repeats") else t for k, t in options.items()}
        exact = ops.MambaWeights(*(w.double() for w in weights))
        with ops.use_backend("reference"):
            expected, expected_sums, *both = ops.mamba_inner(xz.double(), exact, **wide)
    assert y.dtype == dtype
    for one, other in zip((y, b, c), (expected, *both), strict=True):
        assert (one.double() - other).norm() < TOLERANCE[dtype] * other.norm()
    assert (sums - expected_sums).norm() <= 10 * TOLERANCE[dtype] * expected_sums.norm()


@pytest.fixture
def _scan_computes_deltas(monkeypatch):
    monkeypatch.setattr(project, "_timescales", None)


@pytest.mark.usefixtures("_scan_computes_deltas")
@pytest.mark.parametrize(
    ("sizes", "reverse", "dtype", "extra", "stats"),
    [
        ((2, 7, 70, 3, 5), (False, True), torch.float32, (), ()),
        ((1, 9, 40, 17, 16), (True, False, True), torch.float16, ("delta_scale", "gap"), ("output",)),
        ((3, 5, 33, 33, 2), (True,), torch.float32, ("repeats", "index", "source"), ()),
        ((1, 1, 64, 4, 8), (False, True), torch.bfloat16, ("delta_scale", "index", "source"), ()),
        ((9, 8, 65, 1, 1), (False, True), torch.float32, ("repeats", "gap"), ()),
    ],
)
def test_without_statistics_of_deltas(sizes, reverse, dtype, extra, stats):
    check(sizes, reverse, dtype, extra, stats)


@pytest.mark.parametrize("extra", [(), ("delta_scale", "index", "source")])
def test_statistics_of_deltas_come_from_the_projection(extra):
    check((2, 7, 70, 3, 5), (False, True), torch.float32, extra, ("delta", "write", "output"))


def test_tiles_that_span_images():
    """Images of one token and of a few: every tap beyond an image is zero."""
    for length in (1, 2, 3):
        check((70 // length, length, 16, 2, 2), (False, True), torch.float32)
