"""From a source's images to batches: decoding, hashing, preprocessing, and what happens to images that fail."""

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from mtr_lab.data.timm_sources import StreamSource
from mtr_lab.errors import UserError


class ImageSource(Protocol):
    """Images that can be read in any order."""

    location: str
    classes: Sequence[str] | None
    num_images: int | None

    def __len__(self) -> int: ...
    def id(self, index: int) -> str: ...
    def holdout_key(self, index: int) -> str: ...
    def identity(self) -> str: ...
    def read(self, index: int) -> tuple[bytes | Image.Image, int]: ...


@dataclass(frozen=True)
class Skipped:
    """An image that could not be decoded, where the user allowed it."""

    id: str


# A UserError is an entry and not raised: a DataLoader worker would bury its message in a traceback.
Entry: TypeAlias = dict[str, Any] | Skipped | UserError


@dataclass(frozen=True)
class Preparation:
    """What is done to every image of a dataset: preprocessing, label mapping, the rule for failures.

    Attributes:
        transform: decoded RGB image -> (3, H, W) tensor: float32 for training, uint8 for evaluation.
        label_map: model output of each label; ``None``: labels are outputs.
        num_classes: how many outputs there are; ``None``: not known.
        on_error: ``"fail"`` or ``"skip"`` an image that cannot be decoded.
    """

    transform: Callable[[Image.Image], Tensor]
    label_map: Sequence[int] | None
    num_classes: int | None
    on_error: str

    def entry(self, id: str, pixels: Tensor, hash: str, label: int) -> Entry:
        """One entry of a batch, of an image that has been transformed."""
        known = len(self.label_map) if self.label_map is not None else self.num_classes
        if known is not None and not 0 <= label < known:
            return UserError(
                f"label {label} of image {id} is outside the {known} classes: choose a split with labels, or weights "
                "trained on these classes."
            )
        output = self.label_map[label] if self.label_map is not None else label
        return {"image": pixels, "label": output, "id": id, "hash": hash}

    def failure(self, id: str, location: str, reason: str) -> Skipped | UserError:
        """As :func:`undecodable`."""
        return undecodable(id, location, reason, self.on_error)


class Undecodable(Exception):
    """The bytes of an image cannot be read, or are none of an image."""


class Images(Dataset[Entry]):
    """Images read in any order; entries are dictionaries of ``image`` (3, H, W), ``label``, ``id`` and ``hash``.

    ``hash`` is the blake2b-128 hex digest of the encoded file, or of the decoded pixels where the source only gives
    those. An image that cannot be decoded is an entry of its own: ``Skipped`` or a ``UserError``.
    """

    def __init__(self, source: ImageSource, prepare: Preparation) -> None:
        self.source = source
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Entry:
        try:
            image, hash, label = self.read(index)
        except Undecodable as error:
            return self.failure(index, error)
        return self.prepare.entry(self.source.id(index), self.prepare.transform(image), hash, label)

    def read(self, index: int) -> tuple[Image.Image, str, int]:
        """The image in RGB, the hash and the source's own label.

        Raises:
            Undecodable: there is no image to be had.
        """
        try:
            content, label = self.source.read(index)
            return *decode(content), label
        except Exception as error:  # damaged bytes make Pillow raise anything from OSError to struct.error
            raise Undecodable(reason(error)) from error

    def failure(self, index: int, error: Undecodable) -> Skipped | UserError:
        """The entry for an image that cannot be decoded."""
        return self.prepare.failure(self.source.id(index), self.source.location, str(error))


class ImageStream(IterableDataset[Entry]):
    """Images in the order of a stream; entries as in :class:`Images`, ``id`` the running index."""

    def __init__(self, source: StreamSource, prepare: Preparation, complete: bool) -> None:
        """``complete``: one pass has to yield every image of the source, by one worker at most."""
        self.source = source
        self.prepare = prepare
        self.complete = complete

    def __iter__(self) -> Iterator[Entry]:
        worker = get_worker_info()
        prefix = f"{worker.id}/" if worker is not None and worker.num_workers > 1 else ""
        index = -1
        try:
            for index, (content, label) in enumerate(self.source):
                image, hash = decode(content)
                yield self.prepare.entry(f"{prefix}{index}", self.prepare.transform(image), hash, label)
        except OSError as error:
            # The reader's generator is dead after it raised, so the rest of the stream is out of reach.
            yield UserError(f"{self.source.location} broke off at image {prefix}{index + 1}: {error}.")
            return
        missing = (self.source.num_images or 0) - (index + 1)
        if self.complete:
            # timm's WebDataset reader leaves out what it cannot decode and only logs it.
            for number in range(1, missing + 1):
                which = f"(unknown, {number} of {missing})"
                yield self.prepare.failure(which, self.source.location, "its reader left it out")


def undecodable(id: str, location: str, reason: str, on_error: str) -> Skipped | UserError:
    """The entry for an image of ``location`` (a directory, the name of a source) that cannot be decoded."""
    if on_error == "skip":
        return Skipped(id)
    return UserError(
        f"cannot decode image {id} of {location}: {reason}. Replace it, or leave out and list all such images with "
        "dataset.on_error=skip."
    )


def reason(error: Exception) -> str:
    """Why an image cannot be decoded; Pillow names the memory address of the buffer, which helps nobody."""
    return "no known image format" if isinstance(error, UnidentifiedImageError) else str(error)


def decode(content: bytes | Image.Image) -> tuple[Image.Image, str]:
    """The image in RGB, and the blake2b-128 hex digest of the encoded bytes, or of the pixels if there are none."""
    if isinstance(content, bytes):
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB"), hashlib.blake2b(content, digest_size=16).hexdigest()
    rgb = content.convert("RGB")
    return rgb, hashlib.blake2b(rgb.tobytes(), digest_size=16).hexdigest()


class EntryCollate(ABC):
    """Entries -> one batch, or the first mistake among them.

    A batch has what ``stacked`` makes of the images that could be decoded, "id" and "hash", arrays of B str (trainers
    walk through every item of a list), and "skipped", a list of the ids of the images left out; B is smaller than the
    batch size by the number of those.
    """

    @abstractmethod
    def stacked(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch of B images, which may be none, without what all batches have."""

    def __call__(self, entries: Sequence[Entry]) -> dict[str, Any] | UserError:
        for entry in entries:
            if isinstance(entry, UserError):
                return entry
        decoded = [entry for entry in entries if isinstance(entry, dict)]
        return {
            **self.stacked(decoded),
            "id": np.array([entry["id"] for entry in decoded], np.str_),
            "hash": np.array([entry["hash"] for entry in decoded], np.str_),
            "skipped": [entry.id for entry in entries if isinstance(entry, Skipped)],
        }


class ReusedMemory:
    """Shared memory for one batch after the other: new memory for each costs a worker more than filling it.

    What ``stack`` returns is overwritten by the ``slots``-th call after it.
    """

    def __init__(self, slots: int) -> None:
        self._memory: list[Tensor | None] = [None] * slots
        self._next = 0

    def stack(self, images: Sequence[Tensor]) -> Tensor:
        """As ``torch.stack``."""
        memory, first = self._memory[self._next], images[0]
        if (
            memory is None
            or len(memory) < len(images)
            or (memory.shape[1:], memory.dtype) != (first.shape, first.dtype)
        ):
            memory = first.new_empty(len(images), *first.shape).share_memory_()
            self._memory[self._next] = memory
        self._next = (self._next + 1) % len(self._memory)
        return torch.stack(list(images), out=memory[: len(images)])


@dataclass(frozen=True)
class Collate(EntryCollate):
    """Batches of {"image": (B, 3, H, W) float32, or uint8 of evaluation images, "label": (B,) int64}.

    ``input_size`` (3, H, W) shapes a batch none of whose images could be decoded. ``memory`` is what workers put images
    into, if they are to use it again.
    """

    input_size: tuple[int, int, int]
    memory: ReusedMemory | None = None

    def stacked(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        images = [entry["image"] for entry in entries]
        if not images:
            stacked = torch.empty(0, *self.input_size, dtype=torch.uint8)
        elif self.memory is not None:
            stacked = self.memory.stack(images)
        else:
            stacked = default_collate(images)  # in a worker, to shared memory at once
        return {"image": stacked, "label": torch.tensor([entry["label"] for entry in entries], dtype=torch.int64)}


class ImageLoader(DataLoader[Any]):
    """A DataLoader that raises, in the process that iterates it, the UserError a worker met.

    Its workers use their memory again where that is safe: a worker is sent its batch number j + prefetch_factor after
    batch j has been taken, and a batch that is pinned has been copied by then. This holds for images read in any order.
    A worker of a stream may be sent more, when others have come to their end.
    """

    def __init__(self, dataset: Dataset[Any], **options: Any) -> None:
        super().__init__(dataset, **options)
        if isinstance(self.collate_fn, Collate):
            pins = self.num_workers > 0 and self.pin_memory and torch.cuda.is_available()
            safe = pins and self.in_order and not isinstance(dataset, IterableDataset)
            memory = ReusedMemory(self.prefetch_factor or 0) if safe else None
            self.collate_fn = replace(self.collate_fn, memory=memory)

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


class CopiedAhead:
    """Batches with their images on a GPU, each copied there while the GPU computes on the batch before.

    A batch is given out when the next one has come. For the copy not to hold up the host, the batches have to be in
    pinned memory.
    """

    def __init__(self, batches: Iterable[dict[str, Any]], device: torch.device) -> None:
        self._batches, self._device = batches, device

    def __len__(self) -> int:
        return len(cast(Sized, self._batches))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        copies = _copying_stream(self._device)
        started: tuple[dict[str, Any], torch.cuda.Event] | None = None
        for batch in self._batches:
            with torch.cuda.stream(copies):
                coming = {**batch, "image": batch["image"].to(self._device, non_blocking=True)}
                copied = copies.record_event()
            if started is not None:
                yield self._arrived(*started)
            started = coming, copied
        if started is not None:
            yield self._arrived(*started)

    def _arrived(self, batch: dict[str, Any], copied: torch.cuda.Event) -> dict[str, Any]:
        """The batch, for use on the current stream."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)
        batch["image"].record_stream(stream)
        return batch


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all loaders: the memory that copies go to stays with their stream."""
    return torch.cuda.Stream(device)
