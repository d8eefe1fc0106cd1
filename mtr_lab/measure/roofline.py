"""The time a device needs at the very least for a model's work, from three limits of the device.

* matrix: the true FLOPs (``mtr_lab.measure.flops``) at the rate of a big matrix product.
* memory: the fewest bytes, at the rate of a big copy. Weights and images are read once and logits written; between two
  blocks only the token stream passes, in float32 as the residual stream is kept, written once and read once; whatever
  happens inside a block stays on the chip. After the last block only the class token is needed.
* exponential: exp(Δ A) of every token, channel, state and direction of the scans, at the rate of the special-function
  units, 16 a clock and multiprocessor. A kernel that computes some of them by polynomials may beat this one.

A device may work at all three at once, so that the largest is the bound. Units: bytes, FLOPs, ms.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mtr_lab.measure.speed import call_ms

SPECIAL_FUNCTIONS_PER_CLOCK = 16
"""Base-2 exponentials a clock of one multiprocessor of the Hopper generation."""
PROBE_MS = 500  # for each of the two
MATRIX_SIDE = {"cpu": 512, "cuda": 8192}
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}


@dataclass(frozen=True)
class Peaks:
    """What a device can do at most, per second. ``exp`` is ``None`` where its rate is not known (a CPU)."""

    flops: float
    bytes: float
    exp: float | None


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """The fastest of several big matrix products of that dtype and of several big copies; takes about a second."""
    side = MATRIX_SIDE[device.type]
    factor = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.zeros(COPY_BYTES[device.type], device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    exp = None
    if device.type == "cuda":
        chip = torch.cuda.get_device_properties(device)
        hertz = 1000 * getattr(chip, "clock_rate", 0)  # the highest; given in kHz
        exp = float(SPECIAL_FUNCTIONS_PER_CLOCK * chip.multi_processor_count * hertz) or None
    return Peaks(
        flops=2 * side**3 / _fastest(lambda: factor @ factor, device),
        bytes=2 * len(source) / _fastest(lambda: target.copy_(source), device),  # read and written
        exp=exp,
    )


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of so many calls as fill ``PROBE_MS``, after one to warm up."""
    call_ms(run, device)
    times: list[float] = []
    while sum(times) < PROBE_MS:
        times.append(call_ms(run, device))
    return min(times) / 1000


def model_bytes(model: Any, img_size: tuple[int, int], tokens: Sequence[int], batch: int, dtype: torch.dtype) -> int:
    """The fewest bytes that a forward pass moves between the device's memory and the chip.

    Args:
        model: a backbone.
        img_size: (height, width) of the images.
        tokens: how many enter each block, from each sequence of an image.
        dtype: of weights, images and logits.
    """
    wide = torch.promote_types(dtype, torch.float32).itemsize
    weights = sum(parameter.numel() for parameter in model.parameters())
    *channels, _, _ = model.input_shape
    pixels = math.prod(channels) * img_size[0] * img_size[1]
    entering, streams = iter(tokens), 2 * model.stages[-1].width  # read and written; at last one token, for the head
    for stage, layout in zip(model.stages, model.layouts(img_size), strict=True):
        streams += 2 * stage.width * layout.sequences * sum(next(entering) for _ in stage.blocks)
    return weights * dtype.itemsize + batch * ((pixels + model.num_classes) * dtype.itemsize + streams * wide)


def bounds_ms(
    peaks: Peaks, *, flops: float, bytes: float | None, exponentials: float | None
) -> dict[str, float | None]:
    """How long the work takes at the least by each limit; ``None`` where the work or the limit is not known."""
    return {
        "matrix": 1000 * flops / peaks.flops,
        "memory": None if bytes is None else 1000 * bytes / peaks.bytes,
        "exponential": None if peaks.exp is None or exponentials is None else 1000 * exponentials / peaks.exp,
    }
