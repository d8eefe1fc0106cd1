import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mtr_lab.measure import speed as module
from mtr_lab.measure.speed import LATENCY_CALLS, idle_and_stream_ms, images_timed, measure_speed

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def sleeper(seconds_per_image: float) -> Callable[[Tensor], None]:
    def run(images: Tensor) -> None:
        time.sleep(seconds_per_image * len(images))

    return run


def test_figures_are_images_a_second_and_milliseconds() -> None:
    speeds = measure_speed({"slow": sleeper(0.04), "fast": sleeper(0.02)}, torch.zeros(8, 3), max_seconds=0)
    assert list(speeds) == ["slow", "fast"]
    assert speeds["slow"].img_per_s == pytest.approx(25, rel=0.3)
    assert speeds["fast"].img_per_s == pytest.approx(50, rel=0.3)
    assert speeds["slow"].latency_ms["p50"] == pytest.approx(40, rel=0.3)
    assert speeds["fast"].latency_ms["p50"] <= speeds["fast"].latency_ms["p95"]


def test_latency_is_the_50th_and_the_95th_percentile_of_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ROUNDS", 20)
    times = iter(range(20 * (1 + LATENCY_CALLS)))  # each round: the batch, then its first image
    monkeypatch.setattr(module, "_seconds", lambda run, device: float(next(times)))
    latency = measure_speed({"a": sleeper(0)}, torch.zeros(2, 3), min_rounds=20, max_seconds=60)["a"].latency_ms
    images = [1000 * t for t in range(20 * (1 + LATENCY_CALLS)) if t % (1 + LATENCY_CALLS)]
    assert latency["p50"] == pytest.approx((images[49] + images[50]) / 2)
    assert latency["p95"] == pytest.approx(0.95 * images[94] + 0.05 * images[95])


def test_a_machine_that_slows_down_does_so_to_all_variants() -> None:
    calls = 0

    def run(images: Tensor) -> None:
        nonlocal calls
        calls += 1
        time.sleep(3e-4 * calls * len(images) / 4)

    speeds = measure_speed({"a": run, "b": run, "c": run}, torch.zeros(4, 1), min_rounds=6, max_seconds=0)
    # One variant after the other, the first would be more than twice as fast as the last.
    figures = [speed.img_per_s for speed in speeds.values()]
    assert max(figures) / min(figures) < 1.4


def test_every_round_visits_all_variants_and_starts_with_another() -> None:
    visits: list[str] = []
    variants = {name: lambda images, name=name: visits.append(name) if len(images) > 1 else None for name in "abc"}
    measure_speed(variants, torch.zeros(2, 1), min_rounds=4, max_seconds=0)
    assert "".join(visits[-12:]) == "abcbcacababc"


def test_the_budget_ends_the_rounds_and_min_rounds_outlasts_it() -> None:
    def rounds(**limits: float) -> int:
        calls = 0

        def run(images: Tensor) -> None:
            nonlocal calls
            calls += len(images) > 1
            time.sleep(2e-3)

        measure_speed({"a": run}, torch.zeros(2, 1), **limits)  # type: ignore[arg-type]
        return calls

    least = rounds(min_rounds=2, max_seconds=0)
    assert rounds(min_rounds=9, max_seconds=0) == least + 7
    assert least < rounds(min_rounds=2, max_seconds=0.2) < least + 40
    assert rounds(min_rounds=1, max_seconds=60) < least + 60  # and there is an end to a generous one


def test_latency_is_of_one_image_without_gradients() -> None:
    seen: set[tuple[int, bool]] = set()
    measure_speed(
        {"a": lambda images: seen.add((len(images), torch.is_grad_enabled()))}, torch.zeros(5, 1), max_seconds=0
    )
    assert seen == {(5, False), (1, False)}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_peak_memory_contains_batch_activations_and_the_resident_weights(device: str) -> None:
    net = nn.Linear(512, 512, bias=False).to(device)  # 1 MiB
    batch = torch.zeros(1024, 512, device=device)  # 2 MiB, and as much comes out
    without = measure_speed({"net": net}, batch, max_seconds=0)
    within = measure_speed({"net": net}, batch, resident={"net": net.parameters()}, max_seconds=0)
    assert without["net"].peak_mib == pytest.approx(4, abs=0.01)
    assert within["net"].peak_mib == pytest.approx(5, abs=0.01)


@pytest.mark.parametrize(
    ("variants", "images", "min_rounds"), [({}, 2, 1), ({"a": torch.neg}, 0, 1), ({"a": torch.neg}, 2, 0)]
)
def test_nothing_to_time_is_an_error(variants: dict, images: int, min_rounds: int) -> None:
    with pytest.raises(ValueError, match="expected variants"):
        measure_speed(variants, torch.zeros(images, 3), min_rounds=min_rounds)


def test_on_a_cpu_one_call_is_both() -> None:
    calls = []
    idle, stream = idle_and_stream_ms(lambda: (calls.append(None), time.sleep(0.01)), torch.device("cpu"))
    assert len(calls) == 1
    assert idle == stream >= 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_stream_of_calls_hides_what_the_host_does() -> None:
    device = torch.device("cuda")

    def run() -> None:
        time.sleep(0.005)
        torch.cuda._sleep(20_000_000)  # cycles, 10 ms or more

    run()
    hidden = [idle - stream for idle, stream in (idle_and_stream_ms(run, device) for _ in range(3))]
    assert any(4 < ms < 7 for ms in hidden)  # of 5; other programs may be at work on the device


def test_a_batch_of_one_image_is_its_own_latency() -> None:
    runs: list[int] = []
    speed = measure_speed({"a": lambda images: runs.append(len(images))}, torch.zeros(1, 1), max_seconds=0)["a"]
    assert len(runs) == images_timed(1)
    assert speed.latency_ms["p50"] == pytest.approx(1000 / speed.img_per_s)
    runs.clear()
    measure_speed({"a": lambda images: runs.append(len(images))}, torch.zeros(3, 1), max_seconds=0)
    assert sum(runs) == images_timed(3)
