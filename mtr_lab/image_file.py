"""Open image files of the formats that datasets have.

Pillow opens a file by its content, whatever its name: it hands PostScript, a program, to Ghostscript.
"""

import io
from functools import cache
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from mtr_lab.regular_file import read_regular

_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "ICO", "TGA")


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """An image file, not decoded yet.

    Raises:
        OSError: it cannot be read, or is a pipe or a device.
        UnidentifiedImageError: it is of no such format.
        Exception: damaged bytes make Pillow raise anything from ``OSError`` to ``struct.error``.
    """
    return Image.open(io.BytesIO(read_regular(file)) if isinstance(file, Path) else file, formats=_known())


def reason(error: Exception) -> str:
    """Why an image cannot be decoded, without the memory address or the path that the error's text contains."""
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


@cache
def _known() -> list[str]:
    """The formats that the installed Pillow reads."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]
