"""Geometry of random scaling and cropping for training on dense tasks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtr_lab.errors import UserError, check_number

Sides = Sequence[int]
"""(height, width)."""


def fitting_scale(image: Tensor, size: Sides) -> float:
    """The largest scale at which a whole image (…, h, w) fits into ``size``."""
    return min(target / side for target, side in zip(size, image.shape[-2:], strict=True))


def random_scale(image: Tensor, size: Sides, factors: tuple[float, float]) -> float:
    """``fitting_scale`` times a log-uniform random factor between the two of ``factors``."""
    low, high = map(math.log, factors)
    return fitting_scale(image, size) * math.exp(low + (high - low) * torch.rand(()).item())


def random_crop(image: Tensor, size: Sides, scale: float) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop of an image (…, h, w) that fits ``size`` at this scale."""
    sides = [min(side, round(target / scale)) for side, target in zip(image.shape[-2:], size, strict=True)]
    corner = [int(torch.randint(side - part + 1, ())) for side, part in zip(image.shape[-2:], sides, strict=True)]
    return corner[0], corner[1], sides[0], sides[1]


def scaled_sides(sides: Sides, size: Sides, scale: float) -> tuple[int, int]:
    """Height and width of a crop after scaling, at most those of ``size``."""
    rows, columns = (min(max(round(side * scale), 1), most) for side, most in zip(sides, size, strict=True))
    return rows, columns


def check_train_transform(options: Mapping[str, Any], *others: str) -> None:
    """Raise a ``UserError`` unless ``dataset.train_transform`` has ``scale``, ``color_jitter`` and ``others``."""
    expected = {"scale", "color_jitter", *others}
    if not isinstance(options, Mapping) or set(options) != expected:
        raise UserError(f"dataset.train_transform={options}: expected {', '.join(sorted(expected))}.")
    scale = options["scale"]
    if not isinstance(scale, Sequence) or len(scale) != 2:
        raise UserError(f"dataset.train_transform.scale={scale}: expected two factors, least and largest.")
    for value in scale:
        check_number("dataset.train_transform.scale", value, float, 0.05, 20)
    if scale[0] > scale[1]:
        raise UserError(f"dataset.train_transform.scale={scale}: expected the least factor before the largest.")
    check_number("dataset.train_transform.color_jitter", options["color_jitter"], float, 0, 1)
