"""Training clips decoded once, kept as bytes on the device that trains on them, and augmented there."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from mtr_lab.data.classification.device_images import check_memory
from mtr_lab.data.epochs import EpochShuffle, random_numbers
from mtr_lab.data.images import Skipped
from mtr_lab.data.video.augmentation import ClipAugmentation
from mtr_lab.data.video.videos import Videos
from mtr_lab.errors import UserError

_CHUNK = 16  # clips that a worker decodes per message


class DeviceClips:
    """The middle clip of every video, (n, 3, T, H, W) uint8 on a device.

    Attributes:
        pixels: see above.
        labels: (n,) int64.
        skipped: names of the videos that could not be read, which are not among the n.

    Raises:
        UserError: they do not fit on the device; a video cannot be read and is not to be skipped.
    """

    def __init__(
        self,
        videos: Videos,
        indices: Sequence[int],
        shape: Sequence[int],
        device: torch.device,
        num_workers: int,
        name: str,
    ) -> None:
        check_memory(len(indices) * torch.Size(shape).numel(), device)
        self.pixels = torch.empty(len(indices), *shape, dtype=torch.uint8, device=device)
        labels: list[int] = []
        self.skipped: list[str] = []
        loader: DataLoader[Any] = DataLoader(
            Subset(videos, indices), batch_size=_CHUNK, num_workers=num_workers, collate_fn=list
        )
        for chunk in track(loader, f"decoding {name}", console=Console(stderr=True), disable=len(loader) < 2):
            for entry in chunk:
                if isinstance(entry, UserError):
                    raise entry
                if isinstance(entry, Skipped):
                    self.skipped.append(entry.id)
                    continue
                self.pixels[len(labels)] = entry["image"][0].to(device)
                labels.append(entry["label"])
        self.pixels, self.labels = self.pixels[: len(labels)], torch.tensor(labels, device=device)

    def __len__(self) -> int:
        return len(self.labels)


class ClipLoader:
    """Batches of augmented clips, each made on the device when it is asked for.

    Args:
        clips: to train on.
        augment: see there.
        normalise: (B, 3, T, H, W) from 0 to 1 -> what the model takes.
        sampler: of numbers of the clips; Lightning tells it the epoch.
        seed: of the augmentation, a function of the seed, the epoch and the clip.
    """

    def __init__(
        self,
        clips: DeviceClips,
        augment: ClipAugmentation,
        normalise: Callable[[Tensor], Tensor],
        sampler: EpochShuffle,
        seed: int,
    ) -> None:
        self._clips, self._augment, self._normalise = clips, augment, normalise
        self.sampler, self._seed = sampler, seed

    def __len__(self) -> int:
        return len(self.sampler) // self.sampler.share

    def __iter__(self) -> Iterator[dict[str, Any]]:
        device = self._clips.labels.device
        with random_numbers(self._seed, self.sampler.epoch):
            random = torch.rand(len(self._clips), self._augment.numbers).to(device)
        for numbers in self.sampler.order().to(device).split(self.sampler.share):
            clips = self._augment(self._clips.pixels[numbers], random[numbers])
            yield {
                "image": self._normalise(clips),
                "label": self._clips.labels[numbers],
                "skipped": self._clips.skipped,
            }
