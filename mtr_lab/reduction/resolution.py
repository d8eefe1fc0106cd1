"""The size of the picture that the backbone gets: ``mtr.resolution``."""

import math
from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor

from mtr_lab.backbones import Backbone, evenly
from mtr_lab.errors import UserError

AUTO = "auto"
"""The size, or the number of frames, that ``Reduction.solve`` chooses."""
Size = tuple[int, ...]
"""(height, width) in pixels; of a shortened video (frames, height, width)."""


def resize_picture(images: Tensor, size: Size) -> Tensor:
    """Resize images (B, channels, H, W), or videos (B, channels, T, H, W), to ``size``.

    Bicubic with antialiasing, as torchvision and timm resize tensors. Values are not clipped. Of a video that is to be
    shorter, frames at even distances remain.
    """
    *frames, height, width = size
    if frames and images.shape[2] != frames[0]:
        images = images[:, :, evenly(images.shape[2], frames[0])]
    size = height, width
    if tuple(images.shape[-2:]) == size:
        return images
    planes = images.flatten(1, -3)  # the frames of a video like channels
    resized = F.interpolate(planes.float(), size=size, mode="bicubic", antialias=True)
    return resized.to(images.dtype).unflatten(1, images.shape[1:-2])


def picture_of(model: Backbone, resolution: float, img_size: Sequence[int]) -> Size:
    """The size that a fixed ``mtr.resolution`` stands for.

    Args:
        resolution: an integer is the shorter side in pixels, the other side follows in proportion; a float is the scale
            of both sides, which are rounded to sizes that the model accepts.
        img_size: (height, width) of the full picture.

    Raises:
        UserError: no number above 0, or a side that does not fit the model's grid.
    """
    if isinstance(resolution, bool) or not isinstance(resolution, int | float) or not 0 < resolution < math.inf:
        raise UserError(
            f"mtr.resolution must be the shorter side in pixels (an integer), a scale of the picture such as 0.75, "
            f"auto or null, got {resolution!r}. Several, as a list, go with mtr.ratio=null."
        )
    if isinstance(resolution, float):
        size = _scaled(model, img_size, resolution)
    else:
        shorter, fitting = min(img_size), _scaled(model, img_size, resolution / min(img_size))
        height, width = (resolution if side == shorter else fit for side, fit in zip(img_size, fitting, strict=True))
        size = height, width
    try:
        model.layouts(size)
    except UserError as error:
        raise UserError(f"mtr.resolution={resolution}: {error}") from error
    return size


def smaller_pictures(model: Backbone, img_size: Sequence[int]) -> Iterator[Size]:
    """All smaller sizes that the model accepts, in the proportions of ``img_size`` as far as its grid allows.

    The largest comes first; the longer side falls by one cell of the coarsest grid at a time.
    """
    steps = max(side // unit for side, unit in zip(img_size, _units(model, img_size), strict=True))
    for step in range(1, steps):
        size = _scaled(model, img_size, 1 - step / steps)
        try:
            model.layouts(size)
        except UserError:  # too small for one patch
            return
        yield size


def fewer_frames(model: Backbone, frames: int | str) -> list[int]:
    """The numbers of frames that ``mtr.frames`` stands for: itself, or for ``auto`` all smaller ones, falling.

    Raises:
        UserError: a model of images, or no number of frames that the model accepts.
    """
    if len(model.input_shape) != 4:
        raise UserError(
            f"mtr.frames={frames}: {type(model).__name__} takes images here, which have no frames to leave "
            "out: take a model with backbone.num_frames, or set mtr.frames=null."
        )
    whole, unit = model.input_shape[1], model.input_shape[1] // model.layouts()[0].frames
    fitting = list(range(whole - unit, 0, -unit))
    if frames == AUTO and fitting:
        return fitting
    if isinstance(frames, bool) or not isinstance(frames, int) or frames not in (whole, *fitting):
        raise UserError(
            f"mtr.frames must be a number of frames up to {whole}, a multiple of {unit}, or auto, got {frames!r}."
        )
    return [frames]


def _scaled(model: Backbone, img_size: Sequence[int], scale: float) -> Size:
    """Both sides scaled, rounded to what fits the grid, at least one cell."""
    height, width = (
        side - unit * min(round(side * (1 - scale) / unit), side // unit - 1)
        for side, unit in zip(img_size, _units(model, img_size), strict=True)
    )
    return height, width


def _units(model: Backbone, img_size: Sequence[int]) -> Size:
    """(vertical, horizontal) pixels by which a size that fits differs from the next."""
    down, across = model.layouts(img_size)[-1].windows
    stride = model.stages[-1].stride
    return stride * down, stride * across
