"""RandAugment of a batch of images, on their device and different for each of them.

Source: Cubuk et al., "RandAugment" (arXiv 1909.13719), in the form of ``timm.data.auto_augment`` whose transforms grow
with the magnitude (``inc1``). Every transform is computed for every image, which keeps one of them, so that nothing
waits for the device.
"""

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
    amount, signed = level[:, None, None, None], signed[:, None, None, None]
    result = images
    for place, function in enumerate(TRANSFORMS.values()):
        chosen = (transform == place)[:, None, None, None]
        result = torch.where(chosen, function(images, amount, signed, mean), result)
    return result


_Transform = Callable[[Tensor, Tensor, Tensor, Sequence[float]], Tensor]
"""(images, level, signed level, mean) -> images; levels are (B, 1, 1, 1)."""


def _warp(images: Tensor, mean: Sequence[float], **entries: Tensor) -> Tensor:
    """Take each pixel from where a matrix says; coordinates from -1 to 1, entries named by row and column."""
    matrix = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
    for name, value in entries.items():
        matrix[:, int(name[1]), int(name[2])] = value.flatten()
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    outside = channel_tensor(tuple(mean), images.device)
    return F.grid_sample(images - outside, grid, align_corners=False) + outside


def _rotate(images: Tensor, level: Tensor, signed: Tensor, mean: Sequence[float]) -> Tensor:
    height, width = images.shape[-2:]
    angle = torch.deg2rad(-30 * signed)
    cosine, sine = angle.cos(), angle.sin()
    return _warp(images, mean, m00=cosine, m01=sine * height / width, m10=-sine * width / height, m11=cosine)


def _shear_x(images: Tensor, level: Tensor, signed: Tensor, mean: Sequence[float]) -> Tensor:
    shift = 0.3 * signed * images.shape[-2] / images.shape[-1]  # from the upper left corner
    return _warp(images, mean, m01=shift, m02=shift)


def _shear_y(images: Tensor, level: Tensor, signed: Tensor, mean: Sequence[float]) -> Tensor:
    shift = 0.3 * signed * images.shape[-1] / images.shape[-2]
    return _warp(images, mean, m10=shift, m12=shift)


def _translate_x(images: Tensor, level: Tensor, signed: Tensor, mean: Sequence[float]) -> Tensor:
    return _warp(images, mean, m02=0.9 * signed)


def _translate_y(images: Tensor, level: Tensor, signed: Tensor, mean: Sequence[float]) -> Tensor:
    return _warp(images, mean, m12=0.9 * signed)


def grey(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)."""
    return 0.2989 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]


def _blend(images: Tensor, other: Tensor | float, signed: Tensor) -> Tensor:
    return (other + (1 + 0.9 * signed).clamp(min=0.1) * (images - other)).clamp(0, 1)


def _brightness(images: Tensor, level: Tensor, signed: Tensor, mean: Sequence[float]) -> Tensor:
    return _blend(images, 0.0, signed)


def _contrast(images: Tensor, level: Tensor, signed: Tensor, mean: Sequence[float]) -> Tensor:
    return _blend(images, grey(images).mean((2, 3), keepdim=True), signed)


def _saturation(images: Tensor, level: Tensor, signed: Tensor, mean: Sequence[float]) -> Tensor:
    return _blend(images, grey(images), signed)


def _sharpness(images: Tensor, level: Tensor, signed: Tensor, mean: Sequence[float]) -> Tensor:
    smooth = images.clone()  # but for the border
    inner = (9 * F.avg_pool2d(images, 3, stride=1) + 4 * images[..., 1:-1, 1:-1]) / 13
    smooth[..., 1:-1, 1:-1] = inner
    return _blend(images, smooth, signed)


def _bytes(images: Tensor) -> Tensor:
    return (255 * images).round()


def _invert(images: Tensor, level: Tensor, signed: Tensor, mean: Sequence[float]) -> Tensor:
    return 1 - images


def _posterize(images: Tensor, level: Tensor, signed: Tensor, mean: Sequence[float]) -> Tensor:
    step = 2 ** (4 + (4 * level).floor())  # 4 bits are kept, down to none
    return (_bytes(images) / step).floor() * step / 255


def _solarize(images: Tensor, level: Tensor, signed: Tensor, mean: Sequence[float]) -> Tensor:
    return torch.where(_bytes(images) < 256 - (256 * level).floor(), images, 1 - images)


def _solarize_add(images: Tensor, level: Tensor, signed: Tensor, mean: Sequence[float]) -> Tensor:
    return torch.where(_bytes(images) < 128, (images + (110 * level).floor() / 255).clamp(max=1), images)


def _auto_contrast(images: Tensor, level: Tensor, signed: Tensor, mean: Sequence[float]) -> Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low), images)


def _equalize(images: Tensor, level: Tensor, signed: Tensor, mean: Sequence[float]) -> Tensor:
    """Source: ``PIL.ImageOps.equalize``, every channel by itself."""
    values = _bytes(images).long().flatten(2)
    counts = values.new_zeros(*values.shape[:2], 256).scatter_add_(2, values, torch.ones_like(values))
    step = (values.shape[2] - counts.gather(2, values.amax(2, keepdim=True))) // 255
    below = counts.cumsum(2) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step[..., None] > 0, (table.gather(2, values) / 255).view_as(images), images)


TRANSFORMS: dict[str, _Transform] = {
    "Rotate": _rotate,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
    "BrightnessIncreasing": _brightness,
    "ContrastIncreasing": _contrast,
    "ColorIncreasing": _saturation,
    "SharpnessIncreasing": _sharpness,
    "Invert": _invert,
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
}
"""By timm's names."""
