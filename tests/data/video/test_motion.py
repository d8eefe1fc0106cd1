"""Generated clips."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mtr_lab import UserError
from mtr_lab.backbones.videomamba import MOTIONS
from mtr_lab.data.video.decoding import read_frames
from mtr_lab.data.video.motion import CLASSES, FRAMES, SIDE, MotionSource, make_clip, palette, save_clip
from mtr_lab.tasks.task import ASSETS


def test_a_clip_is_a_function_of_its_class_and_seed() -> None:
    assert MOTIONS == CLASSES
    clip = make_clip("up", 1, 7)
    assert (clip.shape, clip.dtype) == ((FRAMES, SIDE, SIDE), np.uint8)
    assert (clip == make_clip("up", 1, 7)).all()
    assert (clip != make_clip("up", 1, 8)).any()
    assert (clip != make_clip("down", 1, 7)).any()


def test_a_gif_keeps_every_pixel(tmp_path: Path) -> None:
    clip = make_clip("shrink", 1, 3)
    save_clip(clip, str(tmp_path / "clip.gif"))
    frames = read_frames(tmp_path / "clip.gif", lambda available: range(available))
    assert (frames.permute(0, 2, 3, 1).numpy() == palette()[clip]).all()


def test_the_bundled_clips_are_the_first_of_the_evaluation_split() -> None:
    files = sorted((ASSETS / "motion_sample").rglob("*.gif"), key=lambda file: file.stem)
    assert [f"{file.parent.name}/{file.stem}" for file in files] == [MotionSource("val", 50).id(i) for i in range(50)]
    frames, _ = MotionSource("val", 50).read(7, lambda available: range(available))
    assert torch.equal(read_frames(files[7], lambda available: range(available)), frames)
    assert sum(file.stat().st_size for file in files) < 1.2e6


def test_one_frame_tells_no_class() -> None:
    """The pixels that shapes cover are as many in every class, and as often in the upper half."""
    background = len(palette()) - 6
    covered = {name: np.stack([make_clip(name, 5, i)[-1] >= background for i in range(50)]) for name in CLASSES}
    shares = [masks.mean() for masks in covered.values()]
    assert max(shares) < 1.3 * min(shares)
    upper = [masks[:, : SIDE // 2].sum() / masks.sum() for masks in covered.values()]
    assert 0.35 < min(upper) < max(upper) < 0.65


def test_a_wrong_split_or_count_is_refused() -> None:
    with pytest.raises(UserError, match="train and val, not 'test'"):
        MotionSource("test", 4)
    with pytest.raises(UserError, match=r"dataset\.count"):
        MotionSource("val", 0)
