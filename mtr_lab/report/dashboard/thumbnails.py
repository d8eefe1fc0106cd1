"""Pictures of a run as small WebP files, to be embedded in a page."""

import base64
import io
from pathlib import Path

from PIL import Image, ImageSequence

from mtr_lab.image_file import open_image

SIDE = 1400
"""The longest side of a thumbnail, px."""
MOVING_SIDE = 480
"""The same of an animation."""
_QUALITY = 55


def thumbnail(path: Path) -> str:
    """The picture, made smaller, as the data URI of a WebP file; an animation stays one.

    Raises:
        Exception: the file cannot be read, or is not a picture; see :func:`~mtr_lab.image_file.open_image`.
    """
    stream = io.BytesIO()
    with open_image(path) as picture:
        frames = [_fitted(frame, picture) for frame in ImageSequence.Iterator(picture)]
        first, *others = frames
        moving = {"append_images": others, "duration": _durations(picture), "loop": 0} if others else {}
        first.save(stream, "WEBP", quality=_QUALITY, save_all=bool(others), **moving)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _fitted(frame: Image.Image, picture: Image.Image) -> Image.Image:
    side = MOVING_SIDE if getattr(picture, "is_animated", False) else SIDE
    small = frame.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2)
    return small


def _durations(picture: Image.Image) -> list[int]:
    """Of the frames, ms."""
    return [frame.info.get("duration", 0) for frame in ImageSequence.Iterator(picture)]
