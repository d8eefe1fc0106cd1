import pytest
import torch

from mtr_lab import create_model
from mtr_lab.measure import roofline
from mtr_lab.measure.flops import Work, model_costs
from mtr_lab.measure.roofline import Peaks, bounds_ms, measure_peaks, model_bytes

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def model():
    """Two blocks of width 8 (16 inner channels, 4 states), 2 x 3 patches of 4² pixels and a class token, 5 classes."""
    return create_model(
        "vim_ti", img_size=(8, 12), patch_size=4, stride=4, depth=2, embed_dim=8, d_state=4, num_classes=5
    )


@pytest.mark.parametrize(
    ("dtype", "narrow", "wide"), [(torch.float16, 2, 4), (torch.float32, 4, 4), (torch.float64, 8, 8)]
)
def test_bytes_by_hand(model, dtype: torch.dtype, narrow: int, wide: int) -> None:
    embedding = 8 * 3 * 4 * 4 + 8 + 8 + 7 * 8  # convolution and its bias, class token, positions
    direction = 16 * 4 + 16 + (1 + 2 * 4) * 16 + 16 * 1 + 16 + 16 * 4 + 16  # conv, x_proj, dt_proj, A, D
    block = 8 + 8 * 32 + 2 * direction + 16 * 8  # norm, in_proj, out_proj
    weights = embedding + 2 * block + 8 + 8 * 5 + 5  # and the last norm and the head
    assert weights == sum(p.numel() for p in model.parameters())

    # 7 tokens enter the first block and 4 the second, one leaves it; each is written once and read once.
    image = (3 * 8 * 12 + 5) * narrow + 2 * (7 + 4 + 1) * 8 * wide
    for batch in (1, 10):
        assert model_bytes(model, (8, 12), [7, 4], batch, dtype) == weights * narrow + batch * image


def test_a_video_is_read_frame_by_frame() -> None:
    geometry = {"img_size": (8, 12), "patch_size": 4, "depth": 2, "embed_dim": 8, "d_state": 4, "num_classes": 5}
    video = create_model("videomamba_ti", num_frames=6, kernel_size=2, **geometry)
    weights = sum(p.numel() for p in video.parameters())
    per_video = 3 * 6 * 8 * 12 + 5 + 2 * (19 + 10 + 1) * 8
    assert model_bytes(video, (8, 12), [19, 10], 2, torch.float32) == 4 * (weights + 2 * per_video)


def test_exponentials_by_hand(model) -> None:
    costs, tokens = model_costs(model, Work([3, 0]))
    assert tokens == [7, 4]
    assert costs.exponentials == 2 * (7 + 4) * 16 * 4


def test_bounds_are_milliseconds_and_none_where_unknown() -> None:
    peaks = Peaks(flops=2e9, bytes=1e9, exp=5e8)
    assert bounds_ms(peaks, flops=1e6, bytes=3e6, exponentials=1e6) == pytest.approx(
        {"matrix": 0.5, "memory": 3, "exponential": 2}
    )
    no_rate = bounds_ms(Peaks(2e9, 1e9, None), flops=1e6, bytes=3e6, exponentials=1e6)
    assert no_rate == pytest.approx({"matrix": 0.5, "memory": 3, "exponential": None})
    no_count = bounds_ms(peaks, flops=1e6, bytes=None, exponentials=None)
    assert no_count == pytest.approx({"matrix": 0.5, "memory": None, "exponential": None})


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_peaks_are_those_of_a_machine(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "PROBE_MS", 20)
    peaks = measure_peaks(torch.device(device), torch.float32)
    assert 1e9 < peaks.flops < 1e16
    assert 1e8 < peaks.bytes < 1e14
    assert peaks.exp is None if device == "cpu" else 1e11 < peaks.exp < 1e15  # type: ignore[operator]


def test_the_fastest_call_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([9000.0, 300.0, 100.0, 200.0])  # ms; the first warms up, the others fill the 500 ms
    monkeypatch.setattr(roofline, "call_ms", lambda run, device: next(times))
    assert roofline._fastest(lambda: None, torch.device("cpu")) == pytest.approx(0.1)
    assert next(times, None) is None
