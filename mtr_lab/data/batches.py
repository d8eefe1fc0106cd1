"""From images to batches, and on to a GPU."""

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from mtr_lab.data.images import Entry, Skipped
from mtr_lab.errors import UserError


class EntryCollate(ABC):
    """Entries -> one batch, or the first mistake among them.

    A batch has what ``stacked`` makes of the images that could be decoded, "id" and "hash", arrays of B str (trainers
    walk through every item of a list), and "skipped", a list of the ids of the images left out; B is smaller than the
    batch size by the number of those.
    """

    @abstractmethod
    def stack(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch of B images, which may be none, without what all batches have."""

    def __call__(self, entries: Sequence[Entry]) -> dict[str, Any] | UserError:
        for entry in entries:
            if isinstance(entry, UserError):
                return entry
        decoded = [entry for entry in entries if isinstance(entry, dict)]
        return {
            **self.stack(decoded),
            "id": np.array([entry["id"] for entry in decoded], np.str_),
            "hash": np.array([entry["hash"] for entry in decoded], np.str_),
            "skipped": [entry.id for entry in entries if isinstance(entry, Skipped)],
        }


class PinnedRing:
    """Memory that workers put batches into and a GPU reads them from: shared with them, and page-locked here.

    Nothing of an image is sent, copied or mapped between the two. Batches take the slots in turn; which is whose
    follows from the order in which a DataLoader gives its workers their batches.

    Args:
        slots: how many batches are there at once.
        batch_size: images in a batch, at most.
        input_size: (3, H, W), of uint8.

    Raises:
        UserError: there is not enough shared memory.
    """

    def __init__(self, slots: int, batch_size: int, input_size: tuple[int, int, int]) -> None:
        memory = torch.empty(slots, batch_size, *input_size, dtype=torch.uint8)
        try:
            self._memory = memory.share_memory_()
        except RuntimeError as error:
            raise UserError(
                f"{slots} batches of {batch_size} images, {memory.nbytes >> 20} MiB, do not fit into shared memory. "
                f"Take less dataset.num_workers or a smaller dataset.batch_size, or enlarge /dev/shm. {error}"
            ) from error
        self._done = 0  # batches of this worker
        weakref.finalize(self, _page_lock(self._memory))

    def put(self, images: Sequence[Tensor]) -> int:
        """Stack a worker's next images, which may be none, in the slot that is returned.

        Raises:
            ValueError: they are more than a slot holds.
        """
        if len(images) > self._memory.shape[1]:
            raise ValueError(f"{len(images)} images for a slot of {self._memory.shape[1]}")
        worker: Any = get_worker_info()
        slot = (self._done * worker.num_workers + worker.id) % len(self._memory)
        self._done += 1
        if images:
            torch.stack(list(images), out=self._memory[slot, : len(images)])
        return slot

    def images(self, slot: int, count: int) -> Tensor:
        """The first of a slot, (count, 3, H, W)."""
        return self._memory[slot, :count]


def _page_lock(memory: Tensor) -> Callable[[], None]:
    """Lock the pages of a tensor, and return what unlocks them, in this process alone."""
    runtime, process, address = torch.cuda.cudart(), os.getpid(), memory.data_ptr()
    torch.cuda.check_error(runtime.cudaHostRegister(address, memory.nbytes, 0))

    def unlock() -> None:
        if os.getpid() == process:
            runtime.cudaHostUnregister(address)

    return unlock


@dataclass(frozen=True)
class Collate(EntryCollate):
    """Batches of {"image": (B, 3, H, W) float32, or uint8 of evaluation images, "label": (B,) int64}.

    ``input_size`` (3, H, W) shapes a batch none of whose images could be decoded. With a ``ring``, "image" is a slot of
    it and "label" an array, for neither a tensor is to be sent.
    """

    input_size: tuple[int, int, int]
    ring: PinnedRing | None = None

    def stack(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        images, labels = [entry["image"] for entry in entries], [entry["label"] for entry in entries]
        if self.ring is not None:
            return {"image": self.ring.put(images), "label": np.array(labels, np.int64)}
        # In a worker, to shared memory at once.
        stacked = default_collate(images) if images else torch.empty(0, *self.input_size, dtype=torch.uint8)
        return {"image": stacked, "label": torch.tensor(labels, dtype=torch.int64)}


class ImageLoader(DataLoader[Any]):
    """A DataLoader that raises, in the process that iterates it, the UserError a worker met."""

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def zero_copy(self) -> Iterator[dict[str, Any]]:
        """The batches, each of which stays as it is until the next one is asked for.

        Where ``Collate`` takes evaluation images, uint8 and all of one size, from workers for a loader that pins, they
        come in a ring: a worker is sent batch j + workers · prefetch_factor when batch j is asked for, and puts it
        where batch j - 1 was. This holds for images read in any order; of a stream, a worker may be sent more when
        others have come to their end. The first batch has to be the largest.
        """
        pins = self.num_workers > 0 and self.pin_memory and torch.cuda.is_available()
        in_turn = self.in_order and not self.persistent_workers and not isinstance(self.dataset, IterableDataset)
        if not (pins and in_turn and isinstance(self.collate_fn, Collate) and len(self)):
            yield from self
            return
        slots = min(self.num_workers * cast(int, self.prefetch_factor) + 1, len(self))
        largest = len(next(iter(cast(Any, self.batch_sampler))))
        ring = PinnedRing(slots, largest, self.collate_fn.input_size)
        filling = copy(self)
        filling.collate_fn, filling.pin_memory = replace(self.collate_fn, ring=ring), False
        for batch in filling:
            label = torch.from_numpy(batch["label"])
            yield {**batch, "image": ring.images(batch["image"], len(label)), "label": label}


class Prefetcher:
    """Batches with their tensors on a GPU, copied there while it computes on the batch before.

    A batch is given out when the next one has come. For the copy not to hold up the host, the images have to be in
    pinned memory; those of an :class:`ImageLoader` that pins are.
    """

    def __init__(self, batches: Iterable[dict[str, Any]], device: torch.device) -> None:
        self._batches, self._device = batches, device

    def __len__(self) -> int:
        return len(cast(Sized, self._batches))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        copies = _copying_stream(self._device)
        started: tuple[dict[str, Any], torch.cuda.Event] | None = None
        for batch in self._batches.zero_copy() if isinstance(self._batches, ImageLoader) else self._batches:
            with torch.cuda.stream(copies):
                coming = {key: self._moved(value) for key, value in batch.items()}
                copied = copies.record_event()
            try:
                if started is not None:
                    yield self._arrived(*started)
            finally:
                copied.synchronize()  # its memory is used again from here on, or is no more
            started = coming, copied
        if started is not None:
            yield self._arrived(*started)

    def _moved(self, value: Any) -> Any:
        return value.to(self._device, non_blocking=True) if isinstance(value, Tensor) else value

    def _arrived(self, batch: dict[str, Any], copied: torch.cuda.Event) -> dict[str, Any]:
        """The batch, for use on the current stream."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)
        for value in batch.values():
            if isinstance(value, Tensor):
                value.record_stream(stream)
        return batch


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all loaders: the memory that copies go to stays with their stream."""
    return torch.cuda.Stream(device)
