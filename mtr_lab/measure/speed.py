"""Throughput, latency and peak memory of several variants of a model, timed in turn."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from mtr_lab.measure.memory import peak_memory_mib
from mtr_lab.measure.statistics import median_interval

WARM_UP_CALLS = 2  # the first compiles and fills caches, the second sets the allocator's final sizes
LATENCY_CALLS = 5  # calls with one image for each full batch: p95 needs more samples than a median
MIN_ROUNDS = 6  # the fewest whose smallest and largest ratio are an interval of level 0.95
MAX_ROUNDS = 50

Variant = TypeVar("Variant")


@dataclass(frozen=True)
class Speed:
    """Speed and memory of one variant: throughput and peak of the full batch, latency of one image."""

    img_per_s: float
    latency_ms: dict[str, float]  # "p50" and "p95"
    peak_mib: float
    batch_seconds: tuple[float, ...]
    """Times of the full batch, one a round."""

    def over(self, other: "Speed") -> tuple[float, tuple[float, float]]:
        """How many times as fast as another variant of the same call of ``measure_speed``, with an interval.

        Returns:
            The median over the rounds, in each of which both were timed, and its interval of level 0.95. A machine
            that is slow in a round slows both, so that the ratio is steadier than the speeds.
        """
        ratios = np.array(other.batch_seconds) / np.array(self.batch_seconds)
        return float(np.median(ratios)), median_interval(ratios)


def measure_speed(
    variants: Mapping[str, Callable[[Tensor], object]],
    batch: Tensor,
    *,
    resident: Mapping[str, Iterable[Tensor]] | None = None,
    min_rounds: int = MIN_ROUNDS,
    max_seconds: float = 20.0,
    advance: Callable[[float], None] = lambda share: None,
) -> dict[str, Speed]:
    """Time every variant on ``batch`` and on its first image, in rounds.

        speeds = measure_speed({"none": full, "mtr": reduced}, batch)
        ratio, interval = speeds["mtr"].over(speeds["none"])  # the gain

    A round times all variants in turn, and each round starts with the next variant. A machine that is slow for a while
    then slows all variants alike, so that their ratios are steadier than the figures. Time is wall-clock time between
    two synchronisations of the device, without gradients, after a warm-up.

    Args:
        variants: by name, a function of a batch of images.
        batch: (B, …) on the device to measure.
        resident: by variant, the parameters and buffers to count in ``peak_mib`` with the batch and the allocations of
            the call, see ``peak_memory_mib``; none by default.
        min_rounds: the minimum number of rounds, of any duration.
        max_seconds: for all variants together, without the warm-up; after this time no round starts beyond
            ``min_rounds``, and those time the batch alone.
        advance: called with the share of the work that is done, an estimate.

    Returns:
        By variant: images per second from the median time of the full batch; the 50th and 95th percentile of the time
        of one image, in ms; the peak memory of the full batch, in MiB.

    Raises:
        ValueError: no variants, an empty batch, or fewer than one round.
    """
    if not variants or not len(batch) or min_rounds < 1:
        raise ValueError(
            f"expected variants, images and min_rounds >= 1, got {len(variants)} variants, {len(batch)} images and "
            f"{min_rounds} rounds"
        )
    names = list(variants)
    batch_seconds: dict[str, list[float]] = {name: [] for name in names}
    image_seconds: dict[str, list[float]] = {name: [] for name in names}
    image, alone = batch[:1], len(batch) == 1  # a batch of one image is a sample of the latency, too
    with torch.no_grad():
        for i, run in enumerate(variants.values()):
            advance(0.3 * i / len(variants))
            run(batch)
            for _ in range(0 if alone else WARM_UP_CALLS):
                run(image)
        peak_mib = {  # in the second call of the batch
            name: peak_memory_mib(partial(run, batch), [batch, *(resident or {}).get(name, ())], batch.device)
            for name, run in variants.items()
        }
        start = time.perf_counter()
        for i, order in enumerate(rounds(names, min_rounds, max_seconds)):
            elapsed = time.perf_counter() - start
            advance(0.3 + 0.7 * min(i / min_rounds, max(elapsed / max(max_seconds, 1e-9), i / MAX_ROUNDS), 1.0))
            calls = LATENCY_CALLS if not alone and (i == 0 or elapsed < max_seconds) else 0
            for name in order:
                batch_seconds[name].append(_seconds(partial(variants[name], batch), batch.device))
                if alone:
                    image_seconds[name].append(batch_seconds[name][-1])
                single = partial(variants[name], image)
                image_seconds[name] += [_seconds(single, batch.device) for _ in range(calls)]
    speeds = {}
    for name in names:
        p50, p95 = np.percentile(image_seconds[name], [50, 95]) * 1000
        img_per_s = len(batch) / float(np.median(batch_seconds[name]))
        latency = {"p50": float(p50), "p95": float(p95)}
        speeds[name] = Speed(img_per_s, latency, peak_mib[name], tuple(batch_seconds[name]))
    return speeds


def images_timed(batch: int) -> int:
    """How many images ``measure_speed`` runs at least for each variant, with a batch of that many."""
    return (2 + MIN_ROUNDS) * batch + (WARM_UP_CALLS + LATENCY_CALLS if batch > 1 else 0)


def rounds(variants: Sequence[Variant], min_rounds: int, max_seconds: float) -> Iterator[list[Variant]]:
    """The order of the variants in each round; each round starts with the next variant.

    At least ``min_rounds``, then up to ``MAX_ROUNDS`` as long as ``max_seconds`` have not passed.
    """
    start = time.perf_counter()
    for i in range(max(min_rounds, MAX_ROUNDS)):
        if i >= min_rounds and time.perf_counter() - start > max_seconds:
            break
        first = i % len(variants)
        yield [*variants[first:], *variants[:first]]


def call_ms(run: Callable[[], object], device: torch.device) -> float:
    """Time of one call on an idle device, in ms: between two CUDA events, or wall-clock time on the CPU.

    The time between events includes gaps in which the device waits for the host to launch the next kernel. It does not
    include the final wait of the host for the device.
    """
    return 1000 * _seconds(run, device) if device.type != "cuda" else _calls_ms(run, device, 1)[0]


def idle_and_stream_ms(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Time in ms of one call on an idle device, as ``call_ms``, and of a second call right after it.

    In a stream of calls the host launches one while the device still computes the one before, and the slower of the two
    determines the time. On the CPU, where calls do not overlap, both times are that of one call.
    """
    if device.type != "cuda":
        return (ms := call_ms(run, device)), ms
    idle, stream = _calls_ms(run, device, 2)
    return idle, stream


def _calls_ms(run: Callable[[], object], device: torch.device, calls: int) -> list[float]:
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        torch.cuda.synchronize(device)
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    result = run()
    _synchronize(device)
    seconds = time.perf_counter() - start
    del result  # freed after the time is taken
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
