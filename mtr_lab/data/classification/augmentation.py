"""Random crops, flips and colours of a batch of images, on their device and different for each of them.

The distributions are those of ``timm.data.create_transform``: a random resized crop, flips, then RandAugment, or
brightness, contrast and saturation in random order. What is done to an image follows from its row of random numbers
alone. Nothing waits for the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtr_lab.data.classification.rand_augment import RandAugment, grey

CROP_TRIALS = 10  # then the largest central crop of an allowed shape, as in torchvision
CUBIC = -0.5  # Pillow's


@dataclass(frozen=True)
class Augmentation:
    """How images are augmented, by timm's names.

    Args:
        size: (height, width) of the result.
        interpolation: ``"bilinear"`` or ``"bicubic"``, antialiased.
        scale, ratio: ranges of a crop's share of the area, and of its width / height.
        hflip, vflip: how often an image is mirrored.
        color_jitter: brightness, contrast and saturation change by up to this share; 0 leaves them.
        auto_augment: what is done instead of ``color_jitter``.
    """

    size: tuple[int, int]
    interpolation: str = "bicubic"
    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    auto_augment: RandAugment | None = None

    @property
    def numbers(self) -> int:
        """How many random numbers per image takes."""
        return 2 * CROP_TRIALS + 4 + (6 if self.auto_augment is None else self.auto_augment.numbers)

    def __call__(self, pixels: Tensor, sides: Tensor, random: Tensor) -> Tensor:
        """Augment images.

        Args:
            pixels: (B, 3, H, W) uint8, images resized to one size.
            sides: (B, 2) float32, their heights and widths before that, from which crops are drawn.
            random: (B, numbers) from [0, 1).

        Returns:
            (B, 3, *size) float32 from 0 to 1.
        """
        trials, place, flips, colours = random.split([2 * CROP_TRIALS, 2, 2, self.numbers - 2 * CROP_TRIALS - 4], 1)
        boxes = crop_boxes(sides, trials, place, self.scale, self.ratio)
        mirrored = torch.stack([flips[:, 0] < self.vflip, flips[:, 1] < self.hflip], 1)
        images = resample(pixels, rescaled(boxes, sides, pixels), self.size, mirrored, self.interpolation)
        if self.auto_augment is not None:
            return self.auto_augment(images, colours)
        if not self.color_jitter:
            return images
        factors, order = colours.chunk(2, 1)
        return jitter_colours(images, 1 + self.color_jitter * (2 * factors - 1), order.argsort(1))


def crop_boxes(sides: Tensor, trials: Tensor, place: Tensor, scale: Sequence[float], ratio: Sequence[float]) -> Tensor:
    """Random crops, (B, 4): top, left, height, width, whole numbers of pixels.

    Source: ``torchvision.transforms.RandomResizedCrop``.

    Args:
        sides: (B, 2) height and width of each image.
        trials: (B, 2 * trials) from [0, 1), first those that choose the areas, then those that choose the shapes.
        place: (B, 2) from [0, 1).
        scale, ratio: ranges of the share of the area, and of width / height.
    """
    height, width = sides[:, :1], sides[:, 1:]
    share, shape = trials.chunk(2, 1)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = (low + (high - low) * shape).exp()
    widths, heights = (area * ratios).sqrt().round(), (area / ratios).sqrt().round()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = fits.byte().argmax(1, keepdim=True)
    drawn = torch.cat([heights.gather(1, first), widths.gather(1, first)], 1)
    central = torch.cat(
        [torch.minimum(height, (width / ratio[0]).round()), torch.minimum(width, (height * ratio[1]).round())], 1
    )
    any_fits = fits.any(1, keepdim=True)
    size = torch.where(any_fits, drawn, central)
    corner = torch.where(any_fits, (place * (sides - size + 1)).floor(), ((sides - size) / 2).floor())
    return torch.cat([corner, size], 1)


def rescaled(boxes: Tensor, sides: Tensor, pixels: Tensor) -> Tensor:
    """Boxes of images with these sides after a resize to (B, 3, H, W), at least a pixel high and wide."""
    height, width = pixels.shape[-2:]
    factors = torch.stack([height / sides[:, 0], width / sides[:, 1]], 1)
    corner, size = boxes[:, :2] * factors, (boxes[:, 2:] * factors).clamp(min=1)
    most = torch.stack([height - size[:, 0], width - size[:, 1]], 1)
    return torch.cat([torch.minimum(corner, most), size], 1)


def resample(pixels: Tensor, boxes: Tensor, size: tuple[int, int], mirrored: Tensor, interpolation: str) -> Tensor:
    """Resize a box of every image, and mirror it: two matrix products, over the columns and over the rows.

    Args:
        pixels: (B, 3, H, W) uint8.
        boxes: (B, 4) top, left, height, width.
        size: (height, width) of the result.
        mirrored: (B, 2) bool, upside down and left to right.
        interpolation: ``"bilinear"`` or ``"bicubic"``, antialiased as Pillow does.

    Returns:
        (B, 3, *size) float32 from 0 to 1.
    """
    rows, columns = (
        _weights(
            boxes[:, side], boxes[:, 2 + side], mirrored[:, side], pixels.shape[-2 + side], size[side], interpolation
        )
        for side in range(2)
    )
    images = pixels.float() / 255 @ columns[:, None].transpose(-2, -1)
    return (rows[:, None] @ images).clamp(0, 1)


def _weights(start: Tensor, length: Tensor, mirrored: Tensor, given: int, wanted: int, interpolation: str) -> Tensor:
    """(B, wanted, given): what each pixel of a line adds to each of the resized stretch of it."""
    start, length = start[:, None, None], length[:, None, None]
    scale = length / wanted
    centre = start + (torch.arange(wanted, device=start.device)[:, None] + 0.5) * scale
    pixel = torch.arange(given, device=start.device) + 0.5
    distance = ((pixel - centre) / scale.clamp(min=1)).abs()
    weights = (_cubic(distance) if interpolation == "bicubic" else (1 - distance).clamp(min=0)) * (
        (pixel >= start) & (pixel < start + length)
    )
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.where(mirrored[:, None, None], weights.flip(1), weights)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel at distances x >= 0."""
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * CUBIC - 4 * CUBIC
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def jitter_colours(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Change brightness, contrast and saturation of every image.

    Source: Pillow's ``ImageEnhance``; each blends an image with black, with its mean grey, with its grey image.

    Args:
        images: (B, 3, H, W) from 0 to 1.
        factors: (B, 3) of brightness, contrast and saturation; 1 changes nothing.
        order: (B, 3) which of the three comes first, second and third.
    """
    for kind in order.split(1, 1):
        which, factor = kind[..., None, None], factors.gather(1, kind)[..., None, None]
        greys = grey(images)
        mean = greys.mean((2, 3), keepdim=True)
        other = torch.where(which == 2, greys, torch.where(which == 1, mean, 0.0))
        images = (other + factor * (images - other)).clamp(0, 1)
    return images
