"""Training images decoded once, kept on the device that trains on them, and augmented there."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mtr_lab.data.classification.augmentation import Augmentation
from mtr_lab.data.classification.images import Images, Undecodable
from mtr_lab.data.epochs import EpochShuffle, random_numbers
from mtr_lab.data.images import Skipped
from mtr_lab.errors import UserError

_CHUNK = 64  # images a worker decodes before it reports


class DeviceImages:
    """Images resized to one size, whole, as bytes on a device.

    Args:
        images: of a dataset, for their labels and what happens to those that cannot be decoded.
        indices: of those to keep.
        size: (height, width) to keep them at. Crops have the shapes they would have in the original.
        device: to keep them on.
        num_workers: processes that decode.
        name: of the dataset, for the progress bar.
        progress: whether to draw it.

    Attributes:
        pixels: (n, 3, *size) uint8.
        sides: (n, 2) float32, the originals' heights and widths.
        labels: (n,) int64.
        skipped: names of the images that could not be decoded, which are not among the n.

    Raises:
        UserError: they do not fit on the device; an image cannot be decoded and is not to be skipped.
    """

    def __init__(
        self,
        images: Images,
        indices: Sequence[int],
        size: tuple[int, int],
        device: torch.device,
        num_workers: int,
        name: str,
        progress: bool = True,
    ) -> None:
        check_memory(len(indices) * 3 * size[0] * size[1], device)
        decoded: list[_Decoded] = []
        self.skipped: list[str] = []
        loader: DataLoader[Any] = DataLoader(
            _Resized(images, indices, size), batch_size=_CHUNK, num_workers=num_workers, collate_fn=_stack
        )
        hidden = not progress or len(loader) < 2
        for chunk, skipped in track(loader, f"decoding {name}", console=Console(stderr=True), disable=hidden):
            if isinstance(chunk, UserError):
                raise chunk
            self.skipped += skipped
            decoded.append(chunk)
        pixels, sides, labels = zip(*decoded, strict=True)
        self.pixels, self.sides, self.labels = (torch.cat(part).to(device) for part in (pixels, sides, labels))

    def __len__(self) -> int:
        return len(self.labels)


_Decoded = tuple[Tensor, Tensor, Tensor]


def check_memory(needed: int, device: torch.device) -> None:
    """Raise a ``UserError`` if a number of bytes is more than half of what is free on a GPU."""
    if device.type != "cuda":
        return
    free = torch.cuda.mem_get_info(device)[0]
    if needed > free / 2:
        raise UserError(
            f"dataset.train_cache=device: the training images take {needed / 2**30:.1f} GiB, more than half of the "
            f"{free / 2**30:.1f} GiB that are free on {device}. Set dataset.train_cache=null."
        )


class _Resized(Dataset[Any]):
    """Decodes an image and resizes it."""

    def __init__(self, images: Images, indices: Sequence[int], size: tuple[int, int]) -> None:
        self._images, self._indices, self._size = images, indices, size

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, number: int) -> tuple[dict[str, Any], tuple[int, int]] | Skipped | UserError:
        index = self._indices[number]
        try:
            image, hash, label = self._images.read(index)
        except Undecodable as error:
            return self._images.failure(index, error)
        height, width = self._size
        resized = image.resize((width, height), Image.Resampling.BICUBIC)  # a copy where it has that size
        entry = self._images.prepare.entry(self._images.source.id(index), F.pil_to_tensor(resized), hash, label)
        return (entry, (image.height, image.width)) if isinstance(entry, dict) else entry


def _stack(entries: Sequence[Any]) -> tuple[_Decoded | UserError, list[str]]:
    """The images of a chunk, which may be none, or the first mistake among them; and the names of the others."""
    mistake = next((entry for entry in entries if isinstance(entry, UserError)), None)
    if mistake is not None:
        return mistake, []
    skipped = [entry.id for entry in entries if isinstance(entry, Skipped)]
    decoded = [entry for entry in entries if not isinstance(entry, Skipped)]
    if not decoded:
        return (torch.empty(0, dtype=torch.uint8), torch.empty(0, 2), torch.empty(0, dtype=torch.int64)), skipped
    pixels = torch.stack([entry["image"] for entry, _ in decoded])
    labels = torch.tensor([entry["label"] for entry, _ in decoded])
    return (pixels, torch.tensor([sides for _, sides in decoded], dtype=torch.float32), labels), skipped


class DeviceLoader:
    """Batches of augmented images, each made on the device when it is asked for.

    Args:
        images: to train on.
        augment: see there.
        normalise: (B, 3, H, W) from 0 to 1 -> what the model takes.
        sampler: of numbers of the images; Lightning tells it the epoch.
        seed: of the augmentation, a function of the seed, the epoch and the image.
    """

    def __init__(
        self,
        images: DeviceImages,
        augment: Augmentation,
        normalise: Callable[[Tensor], Tensor],
        sampler: EpochShuffle,
        seed: int,
    ) -> None:
        self._images, self._augment, self._normalise = images, augment, normalise
        self.sampler, self._seed = sampler, seed

    def __len__(self) -> int:
        return len(self.sampler) // self.sampler.share

    def __iter__(self) -> Iterator[dict[str, Any]]:
        device = self._images.labels.device
        with random_numbers(self._seed, self.sampler.epoch):
            random = torch.rand(len(self._images), self._augment.numbers).to(device)
        for numbers in self.sampler.order().to(device).split(self.sampler.share):
            images = self._augment(self._images.pixels[numbers], self._images.sides[numbers], random[numbers])
            yield {
                "image": self._normalise(images),
                "label": self._images.labels[numbers],
                "skipped": self._images.skipped,
            }
