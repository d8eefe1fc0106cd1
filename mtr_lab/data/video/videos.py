"""Labelled videos as a dataset: read, sample, label; entries of those that cannot be read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtr_lab.data.classification.images import Preparation, Undecodable
from mtr_lab.data.images import Entry, Skipped
from mtr_lab.data.video.decoding import Choose, Unreadable, decoder_version
from mtr_lab.data.video.sampling import Sampling
from mtr_lab.errors import UserError


class VideoSource(Protocol):
    """Labelled videos in random access."""

    location: str
    classes: Sequence[str] | None
    num_images: int | None

    def __len__(self) -> int: ...
    def id(self, index: int) -> str: ...
    def label(self, index: int) -> int: ...
    def fingerprint(self) -> str: ...
    def read(self, index: int, choose: Choose) -> tuple[Tensor, str]: ...


@dataclass(frozen=True)
class Views:
    """Frames -> views, as ``Sampling`` has them; it also names the decoder, by which a cache is found."""

    sampling: Sampling
    decoder: str

    @classmethod
    def of(cls, sampling: Sampling) -> "Views":
        """With the decoder that is installed."""
        return cls(sampling, decoder_version())

    def __call__(self, frames: Tensor) -> Tensor:
        return self.sampling.views_of(frames)


class Videos(Dataset[Entry]):
    """Labelled videos; entries are dictionaries of ``image`` (views, 3, T, H, W) uint8, ``label``, ``id``, ``hash``.

    The entry of a video that cannot be read is ``Skipped`` or a ``UserError``.
    """

    def __init__(self, source: VideoSource, prepare: Preparation, sampling: Sampling) -> None:
        self.source, self.prepare = source, prepare
        self._sampling = sampling

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Entry:
        try:
            frames, hash, label = self.read(index)
        except Undecodable as error:
            return self.failure(index, error)
        return self.prepare.entry(self.source.id(index), self.prepare.transform(frames), hash, label)  # type: ignore[arg-type]

    def read(self, index: int) -> tuple[Tensor, str, int]:
        """The frames of all clips of a video, its hash, and its label in the source.

        Raises:
            Undecodable: the video cannot be read.
        """
        try:
            return *self.source.read(index, self._sampling.frames), self.source.label(index)
        except (Unreadable, OSError) as error:
            raise Undecodable(str(error)) from error

    def failure(self, index: int, error: Undecodable) -> Skipped | UserError:
        """The entry for a video that cannot be read."""
        if self.prepare.on_error == "skip":
            return Skipped(self.source.id(index))
        return UserError(
            f"cannot read the video {self.source.id(index)} of {self.source.location}: {error}. Replace it, or leave "
            "out and list all such videos with dataset.on_error=skip."
        )


class AugmentedVideos(Dataset[Entry]):
    """Training clips: as ``Videos``, with random frames and one random view, float32."""

    def __init__(self, videos: Videos, sampling: Sampling, augment: Callable[[Tensor], Tensor]) -> None:
        self._videos, self._sampling, self._augment = videos, sampling, augment

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: int) -> Entry:
        source = self._videos.source
        try:
            frames, hash = source.read(index, self._sampling.random_frames)
        except (Unreadable, OSError) as error:
            return self._videos.failure(index, Undecodable(str(error)))
        clip = torch.as_tensor(self._augment(frames.transpose(0, 1)[None]))[0]
        return self._videos.prepare.entry(source.id(index), clip, hash, source.label(index))
