"""Read chosen frames of a video file, with the first decoder that is installed."""

import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor

from mtr_lab.data.files import is_image
from mtr_lab.data.images import decode
from mtr_lab.data.walk import is_hidden
from mtr_lab.errors import UserError
from mtr_lab.image_file import open_image
from mtr_lab.packages import installed

VIDEOS = (
    *(".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv", ".3gp", ".flv", ".ogv"),
    *(".gif", ".webp", ".apng"),
)
"""The endings of video files; of the last three, Pillow reads the frames."""
_ANIMATIONS = (".gif", ".webp", ".png", ".apng")
_INDEXED = (".m4v", ".mkv", ".mov", ".mp4", ".webm")
"""The endings of containers that list their frames."""

_NO_STREAM = "it has no video stream"

Choose = Callable[[int], Sequence[int]]
"""The number of frames of a video -> the numbers of the frames to read, from 0; raises ``Unreadable``."""


class Unreadable(Exception):
    """The reason why a video cannot be read: no video stream, no frame, too few of them, damaged bytes."""


def read_frames(path: Path, choose: Choose) -> Tensor:
    """The chosen frames of a video, (n, 3, H, W) uint8 RGB.

    Args:
        path: a video, an animated image, or a folder of frames in natural order (``2.png`` before ``10.png``).
        choose: see ``Choose``. It is called again if fewer frames can be decoded than the header promises.

    Raises:
        Unreadable: the video cannot be read, or ``choose`` refuses its length.
        UserError: no decoder is installed.
    """
    if not path.is_dir() and path.suffix.lower() not in _ANIMATIONS:
        read = DECODERS[decoder(path.suffix.lower() in _INDEXED)]
    else:
        read = _read_images
    try:
        if path.exists() and not (path.is_dir() or path.is_file()):
            raise Unreadable("it is a pipe or a device, expected a file")
        if path.is_file() and path.stat().st_size == 0:
            raise Unreadable("the file is empty")
        return read(path, choose)
    except (Unreadable, UserError):
        raise
    except Exception as error:  # decoders raise errors of many types
        raise Unreadable(_reason(error, path)) from error


@cache
def decoder(indexed: bool = True) -> str:
    """The decoder that reads videos, a name of ``DECODERS``.

    Args:
        indexed: whether the container lists its frames. In others, such as MPEG-TS and AVI, torchcodec leaves out
            frames at the start or the end (0.17 with FFmpeg 8), so it is the last choice there.

    Raises:
        UserError: none is installed.
    """
    for name in DECODERS if indexed else ("av", "cv2", "torchcodec"):
        if installed(name) and _works(name):
            return name
    raise UserError(
        "reading videos needs a decoder, torchcodec or PyAV, and neither is installed: pip install 'mtr-lab[video]'. "
        "Animated images (GIF, WebP) need no decoder."
    )


def decoder_version() -> str:
    """The decoders and their versions, empty without one: two decoders differ in the last bit of a colour."""
    try:
        names = dict.fromkeys([decoder(), decoder(indexed=False)])
    except UserError:
        return ""
    return ", ".join(f"{name} {importlib.import_module(name).__version__}" for name in names)


def _works(name: str) -> bool:
    """Whether a decoder runs: torchcodec may be installed without the FFmpeg that it loads at its first use."""
    try:
        importlib.import_module(name)
        if name == "torchcodec":
            from torchcodec.decoders import VideoDecoder

            VideoDecoder(b"no video")
    except Exception as error:
        return name == "torchcodec" and isinstance(error, ValueError | RuntimeError) and "load" not in str(error)
    return True


def _choose(choose: Choose, available: int) -> Sequence[int]:
    if available == 0:
        raise Unreadable("it has no frame")
    return choose(available)


def _read_torchcodec(path: Path, choose: Choose) -> Tensor:
    from torchcodec.decoders import VideoDecoder

    try:
        video = VideoDecoder(str(path))
    except ValueError as error:
        if "video stream" in str(error):
            raise Unreadable(_NO_STREAM) from error
        raise
    frames: Tensor = video.get_frames_at(list(_choose(choose, len(video)))).data
    return frames


def _read_av(path: Path, choose: Choose) -> Tensor:
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise Unreadable(_NO_STREAM)
        promised = container.streams.video[0].frames
    available = promised or sum(1 for _ in _av_frames(path))
    wanted = _choose(choose, available)
    frames, decoded = _take(_av_frames(path), wanted)
    if frames is None:  # the file ends before the header says
        wanted = _choose(choose, decoded)
        frames, _ = _take(_av_frames(path), wanted)
        assert frames is not None
    return frames


def _av_frames(path: Path) -> Iterator[Callable[[], np.ndarray]]:
    """Functions that convert the frames of a file to (H, W, 3) RGB, upright; what follows damaged bytes is left out."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        first = True
        try:
            for frame in container.decode(stream):
                first = False
                yield lambda frame=frame: np.rot90(  # type: ignore[misc]
                    frame.to_ndarray(format="rgb24"), getattr(frame, "rotation", 0) // 90
                )
        except av.error.FFmpegError:
            if first:
                raise


def _read_cv2(path: Path, choose: Choose) -> Tensor:
    import cv2

    def frames() -> Iterator[Callable[[], np.ndarray]]:
        video = cv2.VideoCapture(str(path))
        while video.grab():
            yield lambda: cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB)

    available = sum(1 for _ in frames())
    if not available:
        raise Unreadable("it has no video stream, or damaged bytes")
    taken, _ = _take(frames(), _choose(choose, available))
    assert taken is not None
    return taken


def _take(frames: Iterator[Callable[[], np.ndarray]], wanted: Sequence[int]) -> tuple[Tensor | None, int]:
    """The wanted frames, ``None`` if they are not all there; and how many were decoded."""
    last, taken, count = max(wanted), {}, 0
    for number, convert in enumerate(frames):
        count = number + 1
        if number in wanted:
            taken[number] = torch.from_numpy(np.ascontiguousarray(convert())).permute(2, 0, 1)
        if number == last:
            return torch.stack([taken[number] for number in wanted]), count
    return None, count


def _read_images(path: Path, choose: Choose) -> Tensor:
    """Frames of an animated image, or of a folder."""
    if path.is_dir():
        images = (file for file in path.iterdir() if is_image(file.name) and not is_hidden(file.name))
        files = sorted(images, key=_by_number)
        return torch.stack([_read_image(files[i]) for i in _choose(choose, len(files))])
    with open_image(path) as animation:
        wanted = _choose(choose, getattr(animation, "n_frames", 1))
        frames = {i: _pixels(frame) for i, frame in enumerate(ImageSequence.Iterator(animation)) if i in wanted}
        return torch.stack([frames[i] for i in wanted])


def _read_image(file: Path) -> Tensor:
    with open_image(file) as frame:
        return _pixels(frame)


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(decode(image)[0])).permute(2, 0, 1)


def _by_number(file: Path) -> list[str | int]:
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", file.name))]


def _reason(error: Exception, path: Path) -> str:
    """The first line of a decoder's message, without the path, which the caller names."""
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    if isinstance(error, EOFError):  # of PyAV, for a header without a frame
        return "it has no frame: the file ends after its header"
    text = str(getattr(error, "strerror", None) or error).partition("\n")[0]
    return text.rpartition(str(path))[2].strip(" :'") or type(error).__name__


DECODERS: dict[str, Callable[[Path, Choose], Tensor]] = {
    "torchcodec": _read_torchcodec,
    "av": _read_av,
    "cv2": _read_cv2,
}
"""By the names of their modules; the first that is installed is taken."""
