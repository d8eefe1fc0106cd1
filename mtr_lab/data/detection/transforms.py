"""Images with objects onto a canvas of fixed size: as a whole, or for training a random window of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms import v2

from mtr_lab.data.random_crop import fitting_scale, random_crop, random_scale, scaled_sides

_VISIBLE = 0.3
"""An object of which a window leaves a smaller share is not one of the window's."""


@dataclass(frozen=True)
class Scene:
    """An image on the canvas, at the top left of it, and its n objects."""

    image: Tensor
    """(3, H, W) uint8; what is not covered is of the fill colour."""
    size: tuple[int, int]
    """(height, width) of the part that is covered."""
    boxes: Tensor
    """(n, 4) float32, pixels of the canvas."""
    masks: Tensor | None
    """(n, H, W) uint8."""
    kept: Tensor
    """(n,) int64, which of the objects they are."""


@dataclass(frozen=True)
class Canvas:
    """``size`` (H, W); ``fill``, a colour (3 values to 255)."""

    size: tuple[int, int]
    fill: tuple[float, float, float]

    def whole(self, image: Tensor, boxes: Tensor, masks: Tensor | None) -> Scene:
        """The image (3, h, w) as large as the canvas allows."""
        height, width = image.shape[-2:]
        return self.window(image, boxes, masks, (0, 0, height, width), fitting_scale(image, self.size))

    def window(
        self,
        image: Tensor,
        boxes: Tensor,
        masks: Tensor | None,
        crop: tuple[int, int, int, int],
        scale: float,
        colours: Callable[[Tensor], Tensor] = lambda part: part,
    ) -> Scene:
        """A part of an image, scaled.

        Args:
            image: (3, h, w) uint8.
            boxes: (n, 4).
            masks: (n, h, w) uint8.
            crop: top, left, height and width of the part.
            scale: of its sides.
            colours: what becomes of the part's, once it is scaled.
        """
        top, left, height, width = crop
        rows, columns = scaled_sides((height, width), self.size, scale)
        missing = [0, 0, self.size[1] - columns, self.size[0] - rows]  # left, top, right, bottom
        part = colours(F.resize(F.crop(image, *crop), [rows, columns], antialias=True))
        corner = boxes.new_tensor([left, top, left, top])
        stretch = boxes.new_tensor([columns / width, rows / height, columns / width, rows / height])
        limit = boxes.new_tensor([columns, rows, columns, rows])
        moved = (boxes - corner) * stretch
        visible = moved.clamp(min=0).minimum(limit)
        kept = torch.nonzero((_area(visible) > 0) & (_area(visible) >= _VISIBLE * _area(moved)))[:, 0]
        if masks is not None:
            cropped = F.crop(masks[kept], *crop)
            masks = F.pad(F.resize(cropped, [rows, columns], F.InterpolationMode.NEAREST_EXACT), missing)
        return Scene(F.pad(part, missing, fill=list(self.fill)), (rows, columns), visible[kept], masks, kept)


class Augmentation:
    """Random flips and quarter turns, a random scale and place, random colours.

    Args:
        canvas: what the window is drawn on.
        scale: least and largest factor to the scale at which the whole image fits.
        turns: take any of the eight ways to lay the image, not only its mirror image.
        color_jitter: by how much brightness, contrast and saturation change; the hue by a tenth of it.
    """

    def __init__(self, canvas: Canvas, scale: tuple[float, float], turns: bool, color_jitter: float) -> None:
        self.canvas, self.scale, self.turns = canvas, scale, turns
        self.colours = v2.ColorJitter(color_jitter, color_jitter, color_jitter, color_jitter / 10)

    def __call__(self, image: Tensor, boxes: Tensor, masks: Tensor | None) -> Scene:
        """The arguments and the result as those of :meth:`Canvas.whole`."""
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
        crop = random_crop(image, self.canvas.size, scale)
        return self.canvas.window(image, boxes, masks, crop, scale, self.colours)


def _coin_flip() -> bool:
    return bool(torch.rand(()) < 0.5)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
