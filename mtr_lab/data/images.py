"""Decode and hash images; the entries of images that cannot be decoded."""

import hashlib
import io
from dataclasses import dataclass
from typing import Any, TypeAlias

from PIL import Image, UnidentifiedImageError

from mtr_lab.errors import UserError


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


def reason(error: Exception) -> str:
    """Why an image cannot be decoded, without the memory address that Pillow's message contains."""
    return "no known image format" if isinstance(error, UnidentifiedImageError) else str(error)


def decode(content: bytes | Image.Image) -> tuple[Image.Image, str]:
    """The image in RGB, and the blake2b-128 hex digest of ``content``: the encoded bytes, or the RGB pixels."""
    if isinstance(content, bytes):
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB"), hashlib.blake2b(content, digest_size=16).hexdigest()
    rgb = content.convert("RGB")
    return rgb, hashlib.blake2b(rgb.tobytes(), digest_size=16).hexdigest()
