"""Cut images with label maps into windows for evaluation; random crops for training."""

import math

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms import v2

from mtr_lab.data.random_crop import random_crop, random_scale, scaled_sides
from mtr_lab.data.segmentation.label_maps import IGNORE

OVERLAP = 1 / 3
"""Share of a sliding window that overlaps with the next one."""


class Windows:
    """Cuts an image (3, h, w) into windows of ``size`` (H, W), as described at ``SegmentationDataModule``."""

    def __init__(self, size: tuple[int, int], slide: bool) -> None:
        self.size, self.slide = size, slide

    def __call__(self, image: Tensor) -> tuple[Tensor, list[tuple[int, int]], tuple[int, int]]:
        """Windows (n, 3, H, W) of a normalised image; their (top, left); (height, width) of the scaled image."""
        scales = [target / side for target, side in zip(self.size, image.shape[-2:], strict=True)]
        scale = max(scales) if self.slide else min(scales)
        rows, columns = (max(round(side * scale), 1) for side in image.shape[-2:])
        height, width = self.size
        scaled = F.resize(image, [rows, columns], antialias=True)
        padded = F.pad(scaled, [0, 0, max(width - columns, 0), max(height - rows, 0)])
        offsets = [(top, left) for top in _starts(rows, height) for left in _starts(columns, width)]
        windows = [padded[:, top : top + height, left : left + width] for top, left in offsets]
        return torch.stack(windows), offsets, (rows, columns)


def _starts(length: int, window: int) -> list[int]:
    """First pixels of the windows that together cover ``length`` pixels."""
    count = math.ceil(max(length - window, 0) / (window * (1 - OVERLAP))) + 1
    return [round(i * max(length - window, 0) / max(count - 1, 1)) for i in range(count)]


def first_window(labels: Tensor, scaled: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """The label map of the first of ``Windows``.

    Args:
        labels: (h, w) uint8 of the whole image.
        scaled: (height, width) of the scaled image.
        size: (H, W) of the window.

    Returns:
        (H, W) uint8, ``IGNORE`` beyond the image.
    """
    rows, columns = scaled
    resized = F.resize(labels.cpu()[None], [rows, columns], F.InterpolationMode.NEAREST_EXACT)[0]
    window = np.full(size, IGNORE, np.uint8)
    part = resized[: size[0], : size[1]].numpy()
    window[: part.shape[0], : part.shape[1]] = part
    return window


class RandomCrop:
    """Random scale, crop, horizontal flip and colours of an image with its label map, for training.

    Args:
        size: (H, W), the largest size of the scaled crop.
        scale: least and largest factor to the scale at which the whole image fits.
        color_jitter: strength of the change of brightness, contrast and saturation.
    """

    def __init__(self, size: tuple[int, int], scale: tuple[float, float], color_jitter: float) -> None:
        self.size, self.scale = size, scale
        self.colours = v2.ColorJitter(color_jitter, color_jitter, color_jitter)

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Image (3, h, w) uint8 and labels (h, w) uint8 -> those of the crop, and its padding to ``size``."""
        scale = random_scale(image, self.size, self.scale)
        crop = random_crop(image, self.size, scale)
        rows, columns = scaled_sides(crop[2:], self.size, scale)
        image = self.colours(F.resize(F.crop(image, *crop), [rows, columns], antialias=True))
        labels = F.resize(F.crop(labels[None], *crop), [rows, columns], F.InterpolationMode.NEAREST_EXACT)[0]
        if torch.rand(()) < 0.5:
            image, labels = image.flip(-1), labels.flip(-1)
        return image, labels, [0, 0, self.size[1] - columns, self.size[0] - rows]
