"""Clips × crops of a video, and the frames of clips."""

import pytest
import torch

from mtr_lab import UserError
from mtr_lab.data.video.decoding import Unreadable
from mtr_lab.data.video.sampling import Sampling


@pytest.mark.parametrize(
    ("stride", "clips", "available", "frames"),
    [
        (None, 1, 4, [0, 1, 2, 3]),
        (None, 1, 8, [1, 3, 5, 7]),
        (None, 1, 10, [1, 3, 6, 8]),
        (None, 2, 12, [1, 4, 7, 10, 2, 5, 8, 11]),
        (1, 1, 4, [0, 1, 2, 3]),
        (2, 1, 13, [3, 5, 7, 9]),
        (2, 3, 13, [0, 2, 4, 6, 3, 5, 7, 9, 6, 8, 10, 12]),
        (3, 2, 7, [0, 3, 6, 6, 0, 3, 6, 6]),  # beyond the end the last frame is repeated
    ],
)
def test_frames_of_clips(stride: int | None, clips: int, available: int, frames: list[int]) -> None:
    assert Sampling(4, (8, 8), stride, clips).frames(available) == frames


@pytest.mark.parametrize("stride", [None, 2])
def test_a_short_video_is_refused(stride: int | None) -> None:
    with pytest.raises(Unreadable, match="it has 3 frames and a clip takes 4"):
        Sampling(4, (8, 8), stride).frames(3)


@pytest.mark.parametrize("stride", [None, 3])
def test_random_frames_ascend_and_reach_both_ends(stride: int | None) -> None:
    torch.manual_seed(0)
    drawn = torch.tensor([Sampling(4, (8, 8), stride).random_frames(20) for _ in range(300)])
    assert (drawn.diff(dim=1) > 0).all() if stride is None else (drawn.diff(dim=1) == 3).all()
    assert (drawn.min(), drawn.max()) == (0, 19)


def test_views_are_crops_of_clips_in_order() -> None:
    """A video of twice the width, whose pixels tell their frame and their column."""
    pixels = torch.arange(6)[:, None, None, None] * 20 + torch.arange(16)
    video = pixels.expand(6, 3, 8, 16).to(torch.uint8)
    sampling = Sampling(3, (8, 8), stride=1, clips=2, crops=3)
    views = sampling.views_of(video[sampling.frames(6)])
    assert views.shape == (6, 3, 3, 8, 8)
    assert views[:, 0, :, 0, 0].tolist() == [
        [20 * f + left for f in frames] for frames in ([0, 1, 2], [3, 4, 5]) for left in (0, 4, 8)
    ]


@pytest.mark.parametrize(("height", "width"), [(16, 32), (24, 16), (7, 9)])
def test_the_shorter_side_is_scaled_and_the_middle_is_kept(height: int, width: int) -> None:
    video = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    video[..., height // 2, width // 2] = 255
    (view,) = Sampling(2, (8, 8)).views_of(video)
    assert view.shape == (3, 2, 8, 8)
    brightest = view[0, 0].flatten().argmax().item()
    assert all(abs(place - 3.5) <= 1 for place in divmod(brightest, 8))


@pytest.mark.parametrize(("setting", "value"), [("clips", 0), ("crops", 0), ("stride", 0)])
def test_numbers_below_one_are_refused(setting: str, value: int) -> None:
    with pytest.raises(UserError, match="dataset"):
        Sampling(4, (8, 8), **{setting: value})
