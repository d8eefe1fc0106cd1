"""Random shifts, sizes and colours of training clips, the same in all frames of a clip, on the clips' device."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtr_lab.data.classification.augmentation import jitter_colours, resample
from mtr_lab.errors import UserError, check_number


@dataclass(frozen=True)
class ClipAugmentation:
    """How training clips are augmented.

    Args:
        size: (height, width) of the result.
        shift: pixels by which a clip moves at most, in each direction; its border is repeated.
        zoom: by how much a clip grows or shrinks at most: 0.1 is from 0.9 to 1.1.
        shift_frames: frames by which a clip starts earlier or later at most; its first or last frame is repeated.
        hflip: how often a clip is mirrored.
        color_jitter: brightness, contrast and saturation change by up to this share; 0 leaves them.

    Raises:
        UserError: a value out of its range.
    """

    size: tuple[int, int]
    shift: int = 8
    zoom: float = 0.1
    shift_frames: int = 0
    hflip: float = 0.0
    color_jitter: float = 0.3

    numbers = 11
    """How many random numbers a clip takes."""

    def __post_init__(self) -> None:
        check_number("dataset.train_transform.shift", self.shift, int, 0, min(self.size) // 2)
        check_number("dataset.train_transform.zoom", self.zoom, float, 0, 0.5)
        check_number("dataset.train_transform.shift_frames", self.shift_frames, int, 0)
        check_number("dataset.train_transform.hflip", self.hflip, float, 0, 1)
        check_number("dataset.train_transform.color_jitter", self.color_jitter, float, 0, 1)

    def __call__(self, clips: Tensor, random: Tensor | None = None) -> Tensor:
        """Augment clips.

        Args:
            clips: (B, 3, T, H, W) uint8; their smaller side is scaled to ``size``.
            random: (B, numbers) from [0, 1); drawn by default.

        Returns:
            (B, 3, T, *size) float32 from 0 to 1.
        """
        random = torch.rand(len(clips), self.numbers, device=clips.device) if random is None else random
        zoom, place, flip, late, factors, order = random.split([1, 2, 1, 1, 3, 3], 1)
        if self.shift_frames:
            clips = delay(clips, ((2 * late[:, 0] - 1) * (self.shift_frames + 0.5)).round().long())
        frames = clips.shape[2]
        planes = clips.flatten(1, 2)  # (B, 3 · T, H, W)
        scale = max(side / given for side, given in zip(self.size, planes.shape[-2:], strict=True))
        border = self._border(scale)
        planes = F.pad(planes.float(), (border, border, border, border), mode="replicate").to(torch.uint8)
        sides = torch.tensor(self.size, device=clips.device) / scale
        part = sides * (1 + self.zoom * (2 * zoom - 1))
        middle = torch.tensor(planes.shape[-2:], device=clips.device) / 2 + self.shift / scale * (2 * place - 1)
        mirrored = torch.cat([torch.zeros_like(flip, dtype=torch.bool), flip < self.hflip], 1)
        views = resample(planes, torch.cat([middle - part / 2, part], 1), self.size, mirrored, "bilinear")
        views = views.unflatten(1, (3, frames))
        if not self.color_jitter:
            return views
        flat = views.transpose(1, 2).flatten(0, 1)  # (B · T, 3, H, W)
        repeated = [numbers.repeat_interleave(frames, 0) for numbers in (factors, order)]
        flat = jitter_colours(flat, 1 + self.color_jitter * (2 * repeated[0] - 1), repeated[1].argsort(1))
        return flat.unflatten(0, (-1, frames)).transpose(1, 2)

    def _border(self, scale: float) -> int:
        """Pixels to repeat around a clip so that every part that is drawn lies in it."""
        return int((self.shift + self.zoom * max(self.size) / 2) / scale) + 1


def delay(clips: Tensor, frames: Tensor) -> Tensor:
    """Clips (B, 3, T, H, W) that start ``frames`` (B,) int64 later; the first or the last frame is repeated."""
    length = clips.shape[2]
    chosen = (torch.arange(length, device=clips.device) - frames[:, None]).clamp(0, length - 1)
    return clips.transpose(1, 2)[torch.arange(len(clips), device=clips.device)[:, None], chosen].transpose(1, 2)


def clip_augmentation(size: tuple[int, int], options: Mapping[str, Any]) -> ClipAugmentation:
    """The augmentation that ``dataset.train_transform`` describes; raises a ``UserError`` for unknown options."""
    known = [field.name for field in fields(ClipAugmentation) if field.name != "size"]
    unknown = set(options) - set(known)
    if unknown:
        raise UserError(f"dataset.train_transform has {', '.join(sorted(unknown))}: expected {', '.join(known)}.")
    return ClipAugmentation(size=size, **options)
