"""Scale, crop and pad images with objects to a fixed size; augmentation for training."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms import v2

from mtr_lab.data.random_crop import fitting_scale, random_crop, random_scale, scaled_sides

_VISIBLE = 0.3
"""Objects with a smaller visible share of their box are removed from a crop."""


@dataclass(frozen=True)
class Scene:
    """An image placed at the top left of the canvas, with its n objects."""

    image: Tensor
    """(3, H, W) uint8, padded with the fill colour."""
    size: tuple[int, int]
    """(height, width) of the image on the canvas."""
    boxes: Tensor
    """(n, 4) float32, in pixels of the canvas."""
    masks: Tensor | None
    """(n, H, W) uint8."""
    kept: Tensor
    """(n,) int64, the indices of these objects among the given ones."""


@dataclass(frozen=True)
class Canvas:
    """The model's input: its ``size`` (H, W) and the colour ``fill`` of the padding (3 values from 0 to 255)."""

    size: tuple[int, int]
    fill: tuple[float, float, float]

    def whole(self, image: Tensor, boxes: Tensor, masks: Tensor | None) -> Scene:
        """The whole image (3, h, w), scaled to fit the canvas."""
        height, width = image.shape[-2:]
        return self.crop(image, boxes, masks, (0, 0, height, width), fitting_scale(image, self.size))

    def crop(
        self,
        image: Tensor,
        boxes: Tensor,
        masks: Tensor | None,
        region: tuple[int, int, int, int],
        scale: float,
        colours: Callable[[Tensor], Tensor] = lambda image: image,
    ) -> Scene:
        """A crop of an image, scaled.

        Args:
            image: (3, h, w) uint8.
            boxes: (n, 4).
            masks: (n, h, w) uint8.
            region: top, left, height and width.
            scale: factor to the sides of the crop.
            colours: transform of the scaled crop's colours.
        """
        top, left, height, width = region
        rows, columns = scaled_sides((height, width), self.size, scale)
        padding = [0, 0, self.size[1] - columns, self.size[0] - rows]  # left, top, right, bottom
        scaled = colours(F.resize(F.crop(image, *region), [rows, columns], antialias=True))
        corner = boxes.new_tensor([left, top, left, top])
        stretch = boxes.new_tensor([columns / width, rows / height, columns / width, rows / height])
        limit = boxes.new_tensor([columns, rows, columns, rows])
        moved = (boxes - corner) * stretch
        visible = moved.clamp(min=0).minimum(limit)
        kept = torch.nonzero((_area(visible) > 0) & (_area(visible) >= _VISIBLE * _area(moved)))[:, 0]
        if masks is not None:
            cropped = F.crop(masks[kept], *region)
            masks = F.pad(F.resize(cropped, [rows, columns], F.InterpolationMode.NEAREST_EXACT), padding)
        return Scene(F.pad(scaled, padding, fill=list(self.fill)), (rows, columns), visible[kept], masks, kept)


class Augmentation:
    """Random flips, quarter turns, scales, crops and colours.

    Args:
        canvas: the model's input.
        scale: least and largest factor to the scale at which the whole image fits.
        turns: besides horizontal flips, also use vertical flips and quarter turns.
        color_jitter: strength of the change of brightness, contrast and saturation; a tenth of it for the hue.
    """

    def __init__(self, canvas: Canvas, scale: tuple[float, float], turns: bool, color_jitter: float) -> None:
        self.canvas, self.scale, self.turns = canvas, scale, turns
        self.colours = v2.ColorJitter(color_jitter, color_jitter, color_jitter, color_jitter / 10)

    def __call__(self, image: Tensor, boxes: Tensor, masks: Tensor | None) -> Scene:
        """Arguments and result as in :meth:`Canvas.whole`."""
        scale = random_scale(image, self.canvas.size, self.scale)
        left, top, right, bottom = boxes.unbind(1)
        if _coin_flip():
            image, masks = image.flip(-1), None if masks is None else masks.flip(-1)
            left, right = image.shape[-1] - right, image.shape[-1] - left
        if self.turns and _coin_flip():
            image, masks = image.flip(-2), None if masks is None else masks.flip(-2)
            top, bottom = image.shape[-2] - bottom, image.shape[-2] - top
        if self.turns and _coin_flip():
            image, masks = image.transpose(-1, -2), None if masks is None else masks.transpose(-1, -2)
            left, top, right, bottom = top, left, bottom, right
        boxes = torch.stack([left, top, right, bottom], dim=1)
        region = random_crop(image, self.canvas.size, scale)
        return self.canvas.crop(image, boxes, masks, region, scale, self.colours)


def _coin_flip() -> bool:
    return bool(torch.rand(()) < 0.5)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
