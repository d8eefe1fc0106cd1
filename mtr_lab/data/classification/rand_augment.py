"""RandAugment of a batch of images, on their device and different for each of them.

Source: Cubuk et al., "RandAugment" (arXiv 1909.13719), in the form of ``timm.data.auto_augment`` whose transforms grow
with the magnitude (``inc1``). Every kind of transform is computed for every image, which keeps one result, so that
nothing waits for the device. The five warps are one of other matrices, the four blends one with other images.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mtr_lab.errors import UserError

STRONGEST = 10  # magnitude


@cache
def channel_tensor(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(3, 1, 1), cached, as the copy to the device waits for all its pending work."""
    return torch.tensor(values, device=device).view(3, 1, 1)


@dataclass(frozen=True)
class RandAugment:
    """Transforms drawn at random, one after the other.

    Args:
        magnitude: mean of their strength, from 0 to 10.
        deviation: its standard deviation.
        layers: how many are drawn.
        probability: how often a drawn one is made.
        mean: (red, green, blue) from 0 to 1, shown where a transform looks beyond the image.
    """

    magnitude: float = STRONGEST
    deviation: float = 0.0
    layers: int = 2
    probability: float = 0.5
    mean: Sequence[float] = (0.5, 0.5, 0.5)

    @classmethod
    def from_text(cls, text: str, mean: Sequence[float]) -> "RandAugment":
        """From timm's notation, such as ``"rand-m9-mstd0.5-inc1"``; m, mstd, n and p are the arguments in order.

        Raises:
            UserError: the text is not of this notation, or stands for another set of transforms.
        """
        values = dict(re.findall(r"-(mstd|inc|m|n|p)(\d+(?:\.\d+)?)", str(text)))
        if "".join(["rand", *(f"-{key}{value}" for key, value in values.items())]) != text or values.get("inc") != "1":
            raise UserError(
                f"dataset.train_transform.auto_augment={text}: dataset.train_cache=device takes RandAugment whose "
                "transforms grow with the magnitude, such as rand-m9-mstd0.5-inc1. Set that, or train_cache to null."
            )
        return cls(
            magnitude=float(values.get("m", STRONGEST)),
            deviation=float(values.get("mstd", 0)),
            layers=int(values.get("n", 2)),
            probability=float(values.get("p", 0.5)),
            mean=mean,
        )

    @property
    def numbers(self) -> int:
        """How many random numbers per image takes."""
        return 4 * self.layers

    def __call__(self, images: Tensor, random: Tensor) -> Tensor:
        """Transform images (B, 3, H, W) from 0 to 1, as numbers (B, ``numbers``) from [0, 1) tell."""
        for choice, chance, strength, sign in random.view(len(random), self.layers, 4).permute(1, 2, 0):
            level = (self.magnitude + self.deviation * torch.special.ndtri(strength)).clamp(0, STRONGEST) / STRONGEST
            signed = torch.where(sign < 0.5, -level, level)
            transform = torch.where(chance < self.probability, (choice * len(TRANSFORMS)).long(), -1)
            images = transformed(images, transform, level, signed, self.mean)
        return images


def transformed(images: Tensor, transform: Tensor, level: Tensor, signed: Tensor, mean: Sequence[float]) -> Tensor:
    """Make one transform of each image.

    Args:
        images: (B, 3, H, W) from 0 to 1.
        transform: (B,) places in ``TRANSFORMS``; -1 changes nothing.
        level, signed: (B,) strengths from 0 to 1, without and with a sign.
        mean: see :class:`RandAugment`.
    """
    chosen = transform[:, None] == torch.arange(len(TRANSFORMS), device=images.device)
    warps, blends, others = chosen.split([len(WARPS), len(BLENDS), len(_OTHERS)], 1)
    result = torch.where(_any(warps), _warped(images, signed[:, None] * warps, mean), images)
    result = torch.where(_any(blends), _blended(images, _masks(blends), 1 + 0.9 * signed), result)
    amount = level[:, None, None, None]
    for mask, function in zip(_masks(others), _OTHERS.values(), strict=True):
        result = torch.where(mask, function(images, amount), result)
    return result


def _any(chosen: Tensor) -> Tensor:
    """(B, n) -> (B, 1, 1, 1)."""
    return chosen.any(1)[:, None, None, None]


def _masks(chosen: Tensor) -> tuple[Tensor, ...]:
    """(B, n) -> n of (B, 1, 1, 1)."""
    return chosen[..., None, None, None].unbind(1)


def _warped(images: Tensor, strengths: Tensor, mean: Sequence[float]) -> Tensor:
    """Rotate, shear or translate: take each pixel from where a matrix of the image says.

    Args:
        images: (B, 3, H, W).
        strengths: (B, 5) of ``WARPS``, from -1 to 1.
        mean: shown beyond the image.
    """
    height, width = images.shape[-2:]
    turn, shear_x, shear_y, shift_x, shift_y = strengths[..., None, None].unbind(1)
    angle = math.radians(-30) * turn
    cosine, sine = angle.cos(), angle.sin()
    lean_x, lean_y = 0.3 * height / width * shear_x, 0.3 * width / height * shear_y  # from the upper left corner
    x, y = _centres(width, images.device), _centres(height, images.device)[:, None]
    grid = torch.stack(  # by hand: affine_grid multiplies matrices, which the precision of TF32 would blur
        [
            cosine * x + (sine * (height / width) + lean_x) * y + (lean_x + 0.9 * shift_x),
            (lean_y - sine * (width / height)) * x + cosine * y + (lean_y + 0.9 * shift_y),
        ],
        -1,
    )
    outside = channel_tensor(tuple(mean), images.device)
    return F.grid_sample(images - outside, grid, align_corners=False) + outside


@cache
def _centres(pixels: int, device: torch.device) -> Tensor:
    """Where the pixels of a line are, if it reaches from -1 to 1."""
    return (2 * torch.arange(pixels, device=device) + 1) / pixels - 1


def _blended(images: Tensor, masks: Sequence[Tensor], factor: Tensor) -> Tensor:
    """Brightness, contrast, saturation or sharpness: away from the image without it, or towards it.

    Args:
        images: (B, 3, H, W).
        masks: (B, 1, 1, 1) of each of ``BLENDS``.
        factor: (B,) above 1: away.
    """
    _, contrast, saturation, sharpness = masks
    greys = grey(images)
    other = torch.where(sharpness, _smooth(images), 0.0)  # of brightness: black
    other = torch.where(saturation, greys, other)
    other = torch.where(contrast, greys.mean((2, 3), keepdim=True), other)
    return other.lerp(images, factor.clamp(min=0.1)[:, None, None, None]).clamp(0, 1)


def grey(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)."""
    return 0.2989 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]


def _smooth(images: Tensor) -> Tensor:
    """Each pixel with its eight neighbours, 5 of 13 parts itself; the border as it is."""
    smooth, inner = images.clone(), images[..., 1:-1, 1:-1]
    smooth[..., 1:-1, 1:-1] = inner.lerp(F.avg_pool2d(images, 3, stride=1), 9 / 13)
    return smooth


def _bytes(images: Tensor) -> Tensor:
    return (255 * images).round()


def _invert(images: Tensor, level: Tensor) -> Tensor:
    return 1 - images


def _posterize(images: Tensor, level: Tensor) -> Tensor:
    step = 2 ** (4 + (4 * level).floor())  # 4 bits are kept, down to none
    return (_bytes(images) / step).floor() * step / 255


def _solarize(images: Tensor, level: Tensor) -> Tensor:
    return torch.where(_bytes(images) < 256 - (256 * level).floor(), images, 1 - images)


def _solarize_add(images: Tensor, level: Tensor) -> Tensor:
    return torch.where(_bytes(images) < 128, (images + (110 * level).floor() / 255).clamp(max=1), images)


def _auto_contrast(images: Tensor, level: Tensor) -> Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low), images)


def _equalize(images: Tensor, level: Tensor) -> Tensor:
    """Source: ``PIL.ImageOps.equalize``, every channel by itself."""
    values = _bytes(images).long().flatten(2)
    counts = values.new_zeros(*values.shape[:2], 256).scatter_add_(2, values, torch.ones_like(values))
    step = (values.shape[2] - counts.gather(2, values.amax(2, keepdim=True))) // 255
    below = counts.cumsum(2) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step[..., None] > 0, (table.gather(2, values) / 255).view_as(images), images)


WARPS = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
BLENDS = ("BrightnessIncreasing", "ContrastIncreasing", "ColorIncreasing", "SharpnessIncreasing")
_OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of images and levels (B, 1, 1, 1)
    "Invert": _invert,
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
}
TRANSFORMS = (*WARPS, *BLENDS, *_OTHERS)
"""timm's names."""
