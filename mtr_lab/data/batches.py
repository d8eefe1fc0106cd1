"""From images to batches, and on to a GPU."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from mtr_lab.data.images import Entry, Skipped
from mtr_lab.errors import UserError


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
