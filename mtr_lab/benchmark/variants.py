"""Timing the cases of a benchmark in turn."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtr_lab import ops
from mtr_lab.backbones import compile
from mtr_lab.benchmark.cases import DTYPES, TIMM, Case
from mtr_lab.measure.memory import peak_memory_mib
from mtr_lab.measure.roofline import Peaks, bounds_ms
from mtr_lab.measure.speed import WARM_UP_CALLS, idle_and_stream_ms, rounds

MIN_ROUNDS = 5


@dataclass
class Variant:
    """A case and its measurements."""

    case: Case
    work: dict[str, Any]
    run: Callable[[], Tensor] | None = None
    ms: list[float] = field(default_factory=list)
    idle_ms: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    error: str | None = None

    def prepare(self, images: Tensor) -> None:
        """Build the model, warm it up, and measure its peak memory, including its CUDA graph."""
        case = self.case
        with torch.inference_mode(False), images.device:  # as usual, parameters are not inference tensors
            model, reduction = case.model()
            model.to(DTYPES[case.dtype])
        if case.asked_speedup is not None:
            assert reduction is not None
            with ops.use_backend(case.backend):
                self.work |= case.solve(model, reduction, images)
        call: Callable[[Tensor], Tensor] = torch.compile(model) if case.backend == TIMM[True] else model
        competitor = case.backend in TIMM.values()

        def run() -> Tensor:
            with contextlib.nullcontext() if competitor else ops.use_backend(case.backend):
                return call(images)

        for _ in range(WARM_UP_CALLS):
            run()
        if case.cuda_graph:
            call = compile(call)  # type: ignore[arg-type]
        self.peak_mib = peak_memory_mib(run, [images, *model.parameters(), *model.buffers()], images.device)
        self.run = run

    def time(self, device: torch.device) -> None:
        """Take one more sample, unless the variant has failed."""
        if self.run is not None:
            idle, ms = idle_and_stream_ms(self.run, device)
            self.idle_ms.append(idle)
            self.ms.append(ms)

    def attempt(self, step: Callable[[], None]) -> None:
        """Take a step; if it raises (out of memory, a kernel that does not compile), store the error and continue."""
        try:
            step()
        except Exception as error:
            self.error = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            self.run = None

    def row(self, peaks: Peaks) -> dict[str, Any]:
        """The row of the table, without the columns that compare it with other rows."""
        bytes, exponentials = self.work["bytes"], self.work["exponentials"]
        flops = self.case.batch * self.work["flops"]
        bound = bounds_ms(peaks, flops=flops, bytes=bytes, exponentials=exponentials)
        row = {key: value for key, value in self.work.items() if key not in ("bytes", "exponentials")}
        row |= dict.fromkeys(("ms", "idle_ms", "img_per_s", "peak_mib")) | {"bound_ms": bound, "error": self.error}
        if self.error is not None:
            return row
        low, ms, high = map(float, np.percentile(self.ms, [25, 50, 75]))
        return row | {
            "ms": ms,
            "ms_quartiles": [low, high],
            "idle_ms": float(np.median(self.idle_ms)),
            "rounds": len(self.ms),
            "img_per_s": 1000 * self.case.batch / ms,
            "peak_mib": self.peak_mib,
            "roofline": max(limit for limit in bound.values() if limit is not None) / ms,
        }


def time_in_turn(
    variants: Sequence[Variant],
    images: Tensor,
    seconds: float,
    advance: Callable[[float, str], None] = lambda share, detail: None,
) -> None:
    """Prepare all variants, then time them in rounds; see ``mtr_lab.measure.speed``.

    Args:
        seconds: for the rounds together, at least ``MIN_ROUNDS``.
        advance: called with the share of the work that is done and with what is at work.
    """
    seed = torch.initial_seed()
    with torch.inference_mode():
        for i, variant in enumerate(variants):
            advance(0.5 * i / len(variants), f"prepare {i + 1}/{len(variants)}")
            torch.manual_seed(seed)  # all variants of a backbone have the same weights
            variant.attempt(partial(variant.prepare, images))
        start = time.perf_counter()
        for i, order in enumerate(rounds(variants, MIN_ROUNDS, seconds)):
            elapsed = (time.perf_counter() - start) / max(seconds, 1e-9)
            advance(0.5 + 0.5 * min(elapsed, i / MIN_ROUNDS, 1.0), f"round {i + 1}")
            for variant in order:
                variant.attempt(partial(variant.time, images.device))
    for variant in variants:
        variant.run = None  # free its memory for the next group
