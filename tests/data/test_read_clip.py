"""Frames from animated images and from folders."""

from pathlib import Path

import pytest
from PIL import Image

from mtr_lab import UserError
from mtr_lab.data.clips import read_clip


def write(path: Path, frames: int) -> Path:
    """Write frames whose red value is their number, to an animation or, without a suffix, to a folder."""
    pages = [Image.new("RGB", (6, 4), (10 * i, 0, 0)) for i in range(frames)]
    if path.suffix:
        pages[0].save(path, save_all=True, append_images=pages[1:], duration=100, lossless=True)
    else:
        path.mkdir()
        for i, page in enumerate(pages):
            page.save(path / f"frame{i}.png")
        (path / "notes.txt").write_text("no frame")
    return path


def numbers(frames: list[Image.Image]) -> list[int]:
    assert all((frame.mode, frame.size) == ("RGB", (6, 4)) for frame in frames)
    return [frame.getpixel((0, 0))[0] // 10 for frame in frames]


@pytest.mark.parametrize("name", ["clip.gif", "clip.webp", "clip.png", "clip"])
def test_frames_are_evenly_spread_and_in_order(tmp_path: Path, name: str) -> None:
    """Twelve frames: in alphabetical order, frame10 would come before frame2."""
    clip = write(tmp_path / name, 12)
    assert numbers(read_clip(clip, 12)) == list(range(12))
    assert numbers(read_clip(clip, 4)) == [1, 4, 7, 10]
    assert numbers(read_clip(clip, 5)) == [1, 3, 6, 8, 10]
    assert numbers(read_clip(clip, 1)) == [6]


@pytest.mark.parametrize("name", ["clip.gif", "clip"])
def test_too_few_frames_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"has too few frames \(3\) for backbone\.num_frames=4"):
        read_clip(write(tmp_path / name, 3), 4)


def test_a_still_image_is_one_frame(tmp_path: Path) -> None:
    write(tmp_path / "clip", 1)
    assert numbers(read_clip(tmp_path / "clip" / "frame0.png", 1)) == [0]
    with pytest.raises(UserError, match=r"too few frames \(1\)"):
        read_clip(tmp_path / "clip" / "frame0.png", 2)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    clip = write(tmp_path / "clip", 3)
    (clip / "frame1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read the video .*clip: .*frame1\.png.*ffmpeg"):
        read_clip(clip, 3)
    cut = write(tmp_path / "clip.gif", 3)
    cut.write_bytes(cut.read_bytes()[:60])
    with pytest.raises(UserError, match=r"clip\.gif"):
        read_clip(cut, 3)
