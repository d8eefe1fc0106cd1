"""Random shifts, sizes, colours and delays of clips."""

import pytest
import torch

from mtr_lab import UserError
from mtr_lab.data.video.augmentation import ClipAugmentation, clip_augmentation, delay


def clips(count: int = 1) -> torch.Tensor:
    """Noise, another in every frame."""
    return torch.randint(256, (count, 3, 4, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_without_changes_a_clip_stays_as_it_is() -> None:
    still = ClipAugmentation((16, 16), shift=0, zoom=0.0, color_jitter=0.0)
    torch.testing.assert_close(still(clips(2)), clips(2) / 255, atol=1e-6, rtol=0)


def test_all_frames_move_alike_and_the_border_is_repeated() -> None:
    moving = ClipAugmentation((16, 16), shift=3, zoom=0.0, color_jitter=0.0)
    random = torch.full((1, moving.numbers), 0.5)
    random[0, 1:3] = torch.tensor([1.0, 0.0])  # the part that is seen: 3 pixels lower, 3 pixels further left
    moved, given = moving(clips(), random)[0], clips()[0] / 255
    torch.testing.assert_close(moved[:, :, :13, 3:], given[:, :, 3:, :13], atol=1e-5, rtol=0)
    torch.testing.assert_close(moved[:, :, 13:, 3:], given[:, :, -1:, :13].expand(-1, -1, 3, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("zoom", [0.0, 1.0])
def test_a_zoom_keeps_the_middle(zoom: float) -> None:
    centred = torch.zeros(1, 3, 2, 16, 16, dtype=torch.uint8)
    centred[..., 6:10, 6:10] = 255
    zooming = ClipAugmentation((16, 16), shift=0, zoom=0.5, color_jitter=0.0)
    random = torch.full((1, zooming.numbers), 0.5)
    random[0, 0] = zoom
    seen = zooming(centred, random)[0, 0, 0]
    assert seen.sum() == pytest.approx(16 / (0.5 if zoom == 0 else 1.5) ** 2, rel=0.1)
    torch.testing.assert_close(seen, seen.flip(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen, seen.flip(1), atol=1e-4, rtol=0)


def test_colours_change_alike_in_all_frames() -> None:
    flat = torch.full((3, 3, 4, 16, 16), 100, dtype=torch.uint8)
    torch.manual_seed(0)
    coloured = ClipAugmentation((16, 16), color_jitter=0.4)(flat)
    assert coloured.std(dim=(2, 3, 4)).max() < 1e-3
    assert coloured.mean(dim=(1, 2, 3, 4)).std() > 0.01


def test_a_clip_starts_later_or_earlier() -> None:
    numbered = torch.arange(4)[None, None, :, None, None].expand(3, 1, -1, 1, 1)
    assert delay(numbered, torch.tensor([0, 1, -2])).flatten(1).tolist() == [[0, 1, 2, 3], [0, 0, 1, 2], [2, 3, 3, 3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": 9}, "shift=9"),
        ({"zoom": 0.6}, "zoom=0.6"),
        ({"hflip": 2}, "hflip=2"),
        ({"scale": 1}, "dataset.train_transform has scale: expected shift, zoom"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        clip_augmentation((16, 16), options)
