"""Frames of a video, from an animated image or a folder of frames."""

import re
from pathlib import Path

from PIL import Image

from mtr_lab.data.files import is_image
from mtr_lab.data.images import decode
from mtr_lab.data.walk import is_hidden
from mtr_lab.errors import UserError
from mtr_lab.image_file import open_image, reason
from mtr_lab.regular_file import read_regular


def read_clip(path: Path, num_frames: int) -> list[Image.Image]:
    """RGB frames of a video, evenly spaced: the middle frame of each of ``num_frames`` equal parts.

    Args:
        path: an animated image (GIF, WebP, PNG), or a folder of frames in natural order (``2.png`` before ``10.png``).

    Raises:
        UserError: the video cannot be read, or has fewer frames.
    """
    try:
        if path.is_dir():
            images = (file for file in path.iterdir() if is_image(file.name) and not is_hidden(file.name))
            files = sorted(images, key=_by_number)
            return [_read(files[i]) for i in _frame_indices(path, len(files), num_frames)]
        with open_image(path) as animation:
            frames = []
            for i in _frame_indices(path, getattr(animation, "n_frames", 1), num_frames):
                animation.seek(i)
                frames.append(decode(animation)[0])
            return frames
    except UserError:
        raise
    except Exception as error:  # damaged bytes make Pillow raise anything from OSError to struct.error
        raise UserError(
            f"cannot read the video {path}: {reason(error)}. Expected an animated GIF or a folder of frames; "
            "ffmpeg -i VIDEO FOLDER/%04d.png makes one."
        ) from error


def _read(file: Path) -> Image.Image:
    try:
        return decode(read_regular(file))[0]
    except Exception as error:  # damaged bytes make Pillow raise anything from OSError to struct.error
        raise ValueError(f"{file.name}, {reason(error)}") from error


def _frame_indices(path: Path, available: int, num_frames: int) -> list[int]:
    if available < num_frames:
        raise UserError(
            f"the video {path} has too few frames ({available}) for backbone.num_frames={num_frames}: give "
            "a longer animated GIF or folder of frames, or lower backbone.num_frames."
        )
    return [(2 * i + 1) * available // (2 * num_frames) for i in range(num_frames)]


def _by_number(file: Path) -> list[str | int]:
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", file.name))]
