"""Which frames and which parts of them a model sees of a video: clips × crops, whose outputs are averaged."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode

from mtr_lab.data.video.decoding import Unreadable
from mtr_lab.errors import UserError, check_number


@dataclass(frozen=True)
class Sampling:
    """Views of a video: for each of ``clips`` choices of frames ``crops`` parts of the picture.

    With a ``stride`` a clip is a run of every ``stride``-th frame; the clips start at even distances, a single one in
    the middle, and a run beyond the end repeats the last frame. Without one a clip spans the whole video: a frame
    of each of ``num_frames`` equal parts, the middle one, or of several clips at even distances in the part.

    Source: the dense and the sparse test protocols of video classifiers, as in VideoMAE (arXiv 2203.12602) and
    VideoMamba (arXiv 2403.06977).

    Args:
        num_frames: T, of a clip.
        size: (height, width) of a view.
        stride: see above.
        clips: how many in time.
        crops: how many in space: 1 is the middle of the picture, whose shorter side is scaled to ``size``; more lie at
            even distances along the longer side.

    Raises:
        UserError: a number below 1.
    """

    num_frames: int
    size: tuple[int, int]
    stride: int | None = None
    clips: int = 1
    crops: int = 1

    def __post_init__(self) -> None:
        for name in ("clips", "crops"):
            check_number(f"dataset.{name}", getattr(self, name), int, 1)
        if self.stride is not None:
            check_number("dataset.frame_stride", self.stride, int, 1)

    @property
    def views(self) -> int:
        """How many views a video has."""
        return self.clips * self.crops

    def frames(self, available: int) -> list[int]:
        """The numbers of the frames of all clips, one clip after the other.

        Raises:
            Unreadable: the video has fewer frames than a clip.
        """
        if available < self.num_frames:
            raise Unreadable(f"it has {_count(available)} and a clip takes {self.num_frames} (backbone.num_frames)")
        return [frame for clip in range(self.clips) for frame in self._clip(available, clip)]

    def _clip(self, available: int, clip: int) -> Sequence[int]:
        if self.stride is None:
            share = (clip + 1) / (self.clips + 1)
            return [int((i + share) * available / self.num_frames) for i in range(self.num_frames)]
        room = max(available - (self.num_frames - 1) * self.stride - 1, 0)
        start = room // 2 if self.clips == 1 else clip * room // (self.clips - 1)
        return [min(start + i * self.stride, available - 1) for i in range(self.num_frames)]

    def random_frames(self, available: int) -> list[int]:
        """The frames of one clip for training: a random start, or a random frame of each part.

        Raises:
            Unreadable: the video has fewer frames than a clip.
        """
        if self.stride is None:
            self.frames(available)  # refuses a video that is too short
            shares = torch.rand(self.num_frames).tolist()
            return [int((i + share) * available / self.num_frames) for i, share in enumerate(shares)]
        room = max(available - (self.num_frames - 1) * self.stride - 1, 0)
        self.frames(available)
        start = int(torch.randint(room + 1, ()))
        return [min(start + i * self.stride, available - 1) for i in range(self.num_frames)]

    def views_of(self, frames: Tensor) -> Tensor:
        """The frames of all clips (clips · T, 3, H, W) uint8 -> the views (views, 3, T, *size) uint8."""
        scaled = fit(frames, self.size)
        clips = scaled.unflatten(0, (self.clips, self.num_frames)).transpose(1, 2)  # (clips, 3, T, H, W)
        cropped = [
            clips[..., top : top + self.size[0], left : left + self.size[1]] for top, left in self._corners(clips)
        ]
        return torch.stack(cropped, 1).flatten(0, 1).contiguous()

    def _corners(self, clips: Tensor) -> list[tuple[int, int]]:
        """(top, left) of every crop."""
        down, across = (side - part for side, part in zip(clips.shape[-2:], self.size, strict=True))
        if self.crops == 1:
            return [(down // 2, across // 2)]
        shares = [crop / (self.crops - 1) for crop in range(self.crops)]
        return [(round(share * down), round(share * across)) for share in shares]


def fit(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale frames (…, H, W) uint8 to the smallest size that covers ``size``, bilinear with antialiasing."""
    height, width = frames.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    wanted = [max(round(height * scale), size[0]), max(round(width * scale), size[1])]
    if wanted == [height, width]:
        return frames
    return F.resize(frames, wanted, InterpolationMode.BILINEAR, antialias=True)


def check_model_takes_videos(input_shape: Sequence[int]) -> None:
    """Raise a ``UserError`` unless a model's input is (3, T, H, W)."""
    if len(input_shape) != 4:
        raise UserError(
            "task=video needs a model that takes videos: such as backbone=videomamba_ti backbone.num_frames=16."
        )


def _count(frames: int) -> str:
    return "one frame" if frames == 1 else f"{frames} frames"
