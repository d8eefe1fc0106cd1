"""Pictures of any source as a model sees them: files, PIL images, arrays."""

import math
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from mtr_lab.data.images import decode
from mtr_lab.errors import UserError
from mtr_lab.image_file import reason
from mtr_lab.regular_file import read_regular

Picture: TypeAlias = str | Path | Image.Image | np.ndarray | Tensor
"""A file, an image, or pixels: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8, or floats from 0 to 1."""


def open_picture(picture: Picture) -> Image.Image:
    """The picture in RGB.

    Raises:
        UserError: it cannot be read, or has another shape or other values.
    """
    if isinstance(picture, str | Path):
        try:
            content: Any = read_regular(Path(picture))
        except OSError as error:
            raise UserError(f"cannot read the image {picture}: {error.strerror or error}.") from error
    else:
        content = picture if isinstance(picture, Image.Image) else _from_pixels(np.asarray(picture))
    try:
        return decode(content)[0]
    except Exception as error:  # of damaged bytes, Pillow raises errors of many types
        name = picture if isinstance(picture, str | Path) else "given"
        raise UserError(f"cannot read the image {name}: {reason(error)}.") from error


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    shape = pixels.shape
    if len(shape) not in (2, 3) or 0 in shape or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
        raise UserError(f"an image of shape {shape}: expected (H, W), or (H, W, channels) with 1, 3 or 4 channels.")
    if np.issubdtype(pixels.dtype, np.floating):
        if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
            raise UserError("an image of floats: expected values from 0 to 1. Give others as uint8, 0 to 255.")
        pixels = (pixels * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise UserError(f"an image of {pixels.dtype}: expected uint8, 0 to 255, or floats from 0 to 1.")
    return Image.fromarray(pixels[..., 0] if len(shape) == 3 and shape[2] == 1 else pixels)


def prepare(picture: Picture, data_config: Mapping[str, Any]) -> Tensor:
    """The picture as the model sees it, (3, H, W) float32: resized, cropped at the centre, normalised.

    Args:
        data_config: timm's, of the model.

    Raises:
        UserError: the picture cannot be read.
    """
    image, transform = open_picture(picture), _transform(tuple(sorted(data_config.items())))
    prepared: Tensor = transform(image)
    return prepared


@lru_cache(maxsize=8)
def _transform(config: tuple[tuple[str, Any], ...]) -> Any:
    return create_transform(**dict(config), is_training=False)


def sample_pictures(count: int) -> list[Path]:
    """Bundled pictures, of as many classes as possible."""
    folder = Path(str(resources.files("mtr_lab") / "assets" / "imagenette_sample"))
    classes = [sorted(directory.glob("*.JPEG")) for directory in sorted(folder.iterdir()) if directory.is_dir()]
    rounds = math.ceil(count / len(classes))
    return [files[turn % len(files)] for turn in range(rounds) for files in classes][:count]
