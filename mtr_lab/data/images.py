"""Decode and hash images; the entries of images that cannot be decoded."""

import hashlib
import io
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import ExifTags, Image

from mtr_lab.errors import UserError
from mtr_lab.image_file import open_image


@dataclass(frozen=True)
class Skipped:
    """An image that could not be decoded, with ``dataset.on_error=skip``."""

    id: str


# A UserError is returned as an entry: raised in a DataLoader worker, its message would drown in a traceback.
Entry: TypeAlias = dict[str, Any] | Skipped | UserError


def undecodable(id: str, location: str, reason: str, on_error: str) -> Skipped | UserError:
    """The entry for an image of ``location`` (a directory, the name of a source) that cannot be decoded."""
    if on_error == "skip":
        return Skipped(id)
    return UserError(
        f"cannot decode image {id} of {location}: {reason}. Replace it, or leave out and list all such images with "
        "dataset.on_error=skip."
    )


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation, what turns the stored pixels upright."""


@dataclass(frozen=True)
class Picture:
    """A decoded image file."""

    stored: Image.Image
    """RGB, the pixels in the order of the file."""
    hash: str
    """blake2b-128 hex digest of the encoded bytes; of the RGB pixels if the source decodes."""
    orientation: int
    """By EXIF, 1 to 8; 1: stored as a viewer shows it."""
    remarks: tuple[str, ...]
    """Keys of ``REMARKS``."""

    @property
    def upright(self) -> Image.Image:
        """As a viewer shows it."""
        return self.stored if self.orientation == 1 else self.stored.transpose(TURNS[self.orientation])

    def seen(self, exif: str) -> Image.Image:
        """Upright if ``exif`` is ``"apply"``, as stored if it is ``"ignore"``."""
        return self.upright if exif == "apply" else self.stored


MOST_ELONGATED = 500
"""Largest ratio of the sides of an image: resized by its shorter side, a line of pixels would fill the memory."""
DECODING = 2
"""Version of what :func:`read_picture` does to pixels, part of the key of decoded images."""
REMARKS = {
    "animated": "has several frames: the first one is taken",
    "transparent": "has transparent pixels: drawn on white",
}
"""What is decided about an image that a user may not expect."""


def read_picture(content: bytes | Image.Image) -> Picture:
    """Decode an image file, or take a decoded image.

    * 16-bit and 32-bit grey values are divided by 257, floating-point ones multiplied by 255.
    * Of several frames, the first is taken. Transparent pixels are drawn on white.

    Raises:
        ValueError: 32-bit values are not from 0 to 65535, floating-point ones not from 0 to 1, or the image is a line.
        Exception: damaged bytes make Pillow raise anything from ``OSError`` to ``struct.error``.
    """
    with open_image(io.BytesIO(content)) if isinstance(content, bytes) else nullcontext(content) as image:
        if max(image.size) > MOST_ELONGATED * min(image.size):
            raise ValueError(
                f"it has {image.width} x {image.height} pixels, one side more than {MOST_ELONGATED} times the other"
            )
        remarks = []
        if getattr(image, "is_animated", False) and image.format != "MPO":  # of a multi-picture JPEG, with previews
            remarks.append("animated")
        orientation = _orientation(image)
        rgb, transparent = _to_rgb(image)
        if transparent:
            remarks.append("transparent")
    encoded = content if isinstance(content, bytes) else rgb.tobytes()
    return Picture(rgb, hashlib.blake2b(encoded, digest_size=16).hexdigest(), orientation, tuple(remarks))


def decode(content: bytes | Image.Image, exif: str = "apply") -> tuple[Image.Image, str]:
    """The RGB image and the hash of a :class:`Picture`."""
    picture = read_picture(content)
    return picture.seen(exif), picture.hash


class Remarks:
    """Prints each of ``REMARKS`` once, with the first image that it is about, whichever process decodes it."""

    def __init__(self) -> None:
        self._printed = torch.zeros(len(REMARKS), dtype=torch.uint8).share_memory_()

    def print(self, picture: Picture, id: str) -> None:
        for remark in picture.remarks:
            index = list(REMARKS).index(remark)
            if not self._printed[index]:
                self._printed[index] = 1
                print(f"{id} {REMARKS[remark]}, as of all such images.", file=sys.stderr, flush=True)


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow turns it upright itself
        return 1
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data of an intact image
        return 1
    return orientation if orientation in TURNS else 1


def _to_rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image in RGB, and whether a pixel was transparent."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _eight_bits(image).convert("RGB"), False
    if not image.has_transparency_data:
        return image.convert("RGB"), False
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema()[0] == 255:
        return rgba.convert("RGB"), False
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB"), True


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits, 32 bits or floating point -> 8 bits."""
    values = np.asarray(image)
    kind, most = ("floating-point", 1) if values.dtype.kind == "f" else (f"{8 * values.itemsize}-bit", 65535)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= most):  # or NaN
        raise ValueError(f"its {kind} values are from {low:g} to {high:g}, expected 0 to {most}")
    return Image.fromarray(np.rint(values * (255 / most)).astype(np.uint8))
