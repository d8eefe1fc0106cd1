"""Lower bounds of a model's run time from three limits of a device (a roofline model).

* matrix: the true FLOPs (``mtr_lab.measure.flops``) at the rate of a big matrix product.
* memory: the fewest bytes at the rate of a big copy. Weights and images are read once, logits written once. Between
  blocks the residual stream, in float32, is written once and read once; inside a block all data stays on the chip.
  After the last block only one token is read.
* exponential: exp(Δ A) of all tokens, channels, states and scan directions at the rate of the special-function units,
  16 per clock and multiprocessor. A kernel that computes some of them by polynomials can be faster than this bound.

The three limits apply at the same time, so the largest bound counts. Units: bytes, FLOPs, ms.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mtr_lab.measure.speed import call_ms

SPECIAL_FUNCTIONS_PER_CLOCK = 16
"""Base-2 exponentials per clock of one multiprocessor of the Hopper generation."""
PROBE_MS = 500  # time to repeat the matrix product, and the copy
MATRIX_SIDE = {"cpu": 512, "cuda": 8192}
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}


@dataclass(frozen=True)
class Peaks:
    """The peak rates of a device, per second. ``exp`` is ``None`` if its rate is unknown (CPUs)."""

    flops: float
    bytes: float
    exp: float | None


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """The rates of the fastest of several big matrix products of that dtype and big copies; takes about a second."""
    side = MATRIX_SIDE[device.type]
    factor = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.zeros(COPY_BYTES[device.type], device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    exp = None
    if device.type == "cuda":
        chip = torch.cuda.get_device_properties(device)
        hertz = 1000 * getattr(chip, "clock_rate", 0)  # the highest clock rate, from kHz
        exp = float(SPECIAL_FUNCTIONS_PER_CLOCK * chip.multi_processor_count * hertz) or None
    return Peaks(
        flops=2 * side**3 / _fastest(lambda: factor @ factor, device),
        bytes=2 * len(source) / _fastest(lambda: target.copy_(source), device),  # read and written
        exp=exp,
    )


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """The minimum time of one call in seconds, repeated for ``PROBE_MS`` after a warm-up call."""
    call_ms(run, device)
    times: list[float] = []
    while sum(times) < PROBE_MS:
        times.append(call_ms(run, device))
    return min(times) / 1000


def model_bytes(model: Any, img_size: tuple[int, int], tokens: Sequence[int], batch: int, dtype: torch.dtype) -> int:
    """The fewest bytes that a forward pass moves between memory and chip.

    Args:
        model: a backbone.
        img_size: (height, width) of the images.
        tokens: for each block the number of tokens of a sequence that enter it.
        dtype: of weights, images and logits.
    """
    wide = torch.promote_types(dtype, torch.float32).itemsize
    weights = sum(parameter.numel() for parameter in model.parameters())
    *channels, _, _ = model.input_shape
    pixels = math.prod(channels) * img_size[0] * img_size[1]
    entering = iter(tokens)
    streams = 2 * model.stages[-1].width  # numbers written and read: after the last block one token, for the head
    for stage, layout in zip(model.stages, model.layouts(img_size), strict=True):
        streams += 2 * stage.width * layout.sequences * sum(next(entering) for _ in stage.blocks)
    return weights * dtype.itemsize + batch * ((pixels + model.num_classes) * dtype.itemsize + streams * wide)


def bounds_ms(
    peaks: Peaks, *, flops: float, bytes: float | None, exponentials: float | None
) -> dict[str, float | None]:
    """The lower bound of the run time by each limit; ``None`` if the work or the rate is unknown."""
    return {
        "matrix": 1000 * flops / peaks.flops,
        "memory": None if bytes is None else 1000 * bytes / peaks.bytes,
        "exponential": None if peaks.exp is None or exponentials is None else 1000 * exponentials / peaks.exp,
    }
