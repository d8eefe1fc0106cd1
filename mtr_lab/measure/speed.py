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

WARM_UP_CALLS = 2  # the first compiles and fills caches, the second shows the allocator its final sizes
LATENCY_CALLS = 5  # of one image for each full batch: p95 needs more samples than the median of a batch
MAX_ROUNDS = 50

Variant = TypeVar("Variant")


@dataclass(frozen=True)
class Speed:
    """What one variant costs: ``img_per_s`` and ``peak_mib`` of the full batch, ``latency_ms`` of one image."""

    img_per_s: float
    latency_ms: dict[str, float]  # "p50" and "p95"
    peak_mib: float


def measure_speed(
    variants: Mapping[str, Callable[[Tensor], object]],
    batch: Tensor,
    *,
    resident: Mapping[str, Iterable[Tensor]] | None = None,
    min_rounds: int = 5,
    max_seconds: float = 20.0,
) -> dict[str, Speed]:
    """Time every variant on ``batch`` and on its first image, in rounds.

        speeds = measure_speed({"none": full, "mtr": reduced}, batch)
        speeds["mtr"].img_per_s / speeds["none"].img_per_s  # the gain

    Each round visits all variants, starting one further than the round before, so that a machine that slows down or
    is busy for a while does so to all of them alike: the ratios between variants are steadier than the figures. A call
    is timed by the wall clock between two synchronisations of the device, with gradients off, after a warm-up.

    Args:
        variants: by name, what to call with a batch of images.
        batch: (B, …) on the device to measure.
        resident: by variant, the parameters and buffers to count in ``peak_mib`` beside the batch and everything the
            call allocates (see ``peak_memory_mib``); without it, the weights are left out.
        min_rounds: at least so many rounds, however long they take.
        max_seconds: no further round starts after this time; it covers all variants together, without the warm-up.

    Returns:
        by variant: images per second from the median time of the full batch; the 50th and 95th percentile of the time
        of one image, in ms; the peak of the full batch, in MiB.

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
    image = batch[:1]
    with torch.no_grad():
        for run in variants.values():
            for _ in range(WARM_UP_CALLS):
                run(batch)
                run(image)
        peak_mib = {
            name: peak_memory_mib(partial(run, batch), [batch, *(resident or {}).get(name, ())], batch.device)
            for name, run in variants.items()
        }
        for order in rounds(names, min_rounds, max_seconds):
            for name in order:
                batch_seconds[name].append(_seconds(partial(variants[name], batch), batch.device))
                one = partial(variants[name], image)
                image_seconds[name] += [_seconds(one, batch.device) for _ in range(LATENCY_CALLS)]
    speeds = {}
    for name in names:
        p50, p95 = np.percentile(image_seconds[name], [50, 95]) * 1000
        img_per_s = len(batch) / float(np.median(batch_seconds[name]))
        speeds[name] = Speed(img_per_s, {"p50": float(p50), "p95": float(p95)}, peak_mib[name])
    return speeds


def rounds(variants: Sequence[Variant], min_rounds: int, max_seconds: float) -> Iterator[list[Variant]]:
    """The order of visits in each round, starting one further than in the round before.

    At least ``min_rounds``; beyond, no round starts after ``max_seconds``, nor more than ``MAX_ROUNDS``.
    """
    start = time.perf_counter()
    for i in range(max(min_rounds, MAX_ROUNDS)):
        if i >= min_rounds and time.perf_counter() - start > max_seconds:
            break
        first = i % len(variants)
        yield [*variants[first:], *variants[:first]]


def call_ms(run: Callable[[], object], device: torch.device) -> float:
    """Time of one call in ms, with the device idle before: between two CUDA events, or by the wall clock on the CPU.

    Events leave out the wait of the host for the device to finish, but contain every gap in which the device waits
    for the host to launch the next kernel.
    """
    return 1000 * _seconds(run, device) if device.type != "cuda" else _calls_ms(run, device, 1)[0]


def idle_and_stream_ms(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Time in ms of one call, as ``call_ms``, and of another made right after it, as each of a stream of calls takes.

    In a stream the host launches a call while the device is at work on the one before; the longer of the two sets the
    pace. On the CPU, where a call is over when it returns, both are the time of one.
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
    del result  # released off the clock
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
