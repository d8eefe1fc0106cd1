"""Collate images to batches, load them in workers, and prefetch them to a GPU."""

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
    """Collates entries to one batch, or returns the first ``UserError`` among them.

    A batch is the dictionary that ``stack`` returns for the B images that could be decoded, and besides: "id" and
    "hash", arrays of B str (not lists, through which Lightning would walk item by item); "skipped", the list of the ids
    of images that could not be decoded. B is the batch size less the skipped images.
    """

    @abstractmethod
    def stack(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch of B ≥ 0 images, without "id", "hash" and "skipped"."""

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
    """Zero-copy transfer from workers to the GPU: a ring buffer in shared memory that this process page-locks.

    Batch j lies in slot j mod n. A DataLoader of w workers gives batch j to worker j mod w, so workers compute their
    slots themselves.

    Args:
        slots: n, the number of batches in the buffer.
        batch_size: largest number of images in a batch.
        input_size: (3, H, W) of the images, which are uint8.

    Raises:
        UserError: the buffer does not fit into shared memory.
    """

    def __init__(self, slots: int, batch_size: int, input_size: tuple[int, int, int]) -> None:
        memory = torch.empty(slots, batch_size, *input_size, dtype=torch.uint8)
        try:
            self._memory = memory.share_memory_()
        except RuntimeError as error:
            raise UserError(
                f"{slots} batches of {batch_size} images, {memory.nbytes >> 20} MiB, do not fit into shared memory. "
                f"Set fewer dataset.num_workers or a smaller dataset.batch_size, or enlarge /dev/shm. {error}"
            ) from error
        self._done = 0  # batches that this worker has put
        weakref.finalize(self, _page_lock(self._memory))

    def put(self, images: Sequence[Tensor]) -> int:
        """Stack the images of a worker's next batch, possibly none, in the batch's slot; return the slot's number.

        Raises:
            ValueError: there are more images than a slot holds.
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
        """The first images in a slot, (count, 3, H, W)."""
        return self._memory[slot, :count]


def _page_lock(memory: Tensor) -> Callable[[], None]:
    """Lock the pages of a tensor; return a function that unlocks them in this process and does nothing in a fork."""
    runtime, process, address = torch.cuda.cudart(), os.getpid(), memory.data_ptr()
    torch.cuda.check_error(runtime.cudaHostRegister(address, memory.nbytes, 0))

    def unlock() -> None:
        if os.getpid() == process:
            runtime.cudaHostUnregister(address)

    return unlock


@dataclass(frozen=True)
class Collate(EntryCollate):
    """Batches with "image", (B, 3, H, W) uint8 for evaluation and float32 for training, and "label", (B,) int64.

    Args:
        input_size: (3, H, W), the shape of a batch without images.
        ring: where to stack images. "image" is then the number of a slot, and "label" a NumPy array: a tensor would be
            copied to shared memory again when the worker sends it.
    """

    input_size: tuple[int, int, int]
    ring: PinnedRing | None = None

    def stack(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        images, labels = [entry["image"] for entry in entries], [entry["label"] for entry in entries]
        if self.ring is not None:
            return {"image": self.ring.put(images), "label": np.array(labels, np.int64)}
        # In a worker, default_collate stacks directly into shared memory.
        stacked = default_collate(images) if images else torch.empty(0, *self.input_size, dtype=torch.uint8)
        return {"image": stacked, "label": torch.tensor(labels, dtype=torch.int64)}


class ImageLoader(DataLoader[Any]):
    """A DataLoader that raises a worker's ``UserError`` in the process that iterates over it."""

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def zero_copy(self) -> Iterator[dict[str, Any]]:
        """The batches; the images of a batch are valid until the next batch is requested.

        Images go through a ``PinnedRing`` if the loader is one for evaluation: with workers that are not persistent,
        ``pin_memory``, ``in_order``, a ``Collate``, and a dataset of known length. They have to be uint8 and of one
        size, the first batch the largest. Any other loader yields its ordinary batches.

        The ring's size follows from the DataLoader: when batch j is requested, the loader sends batch
        j + workers · prefetch_factor to a worker, which overwrites batch j - 1. An ``IterableDataset`` is excluded, as
        a worker gets extra batches once another worker's share is exhausted.
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
    """Copies each batch to a GPU while the GPU computes on the previous batch.

    A batch is yielded once the next one is loaded. Copies are asynchronous only from pinned memory, which an
    :class:`ImageLoader` with ``pin_memory`` provides.
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
                moved = {key: self._move(value) for key, value in batch.items()}
                copied = copies.record_event()
            try:
                if started is not None:
                    yield self._ready(*started)
            finally:
                copied.synchronize()  # the loader may now overwrite or free the host memory of the copy
            started = moved, copied
        if started is not None:
            yield self._ready(*started)

    def _move(self, value: Any) -> Any:
        return value.to(self._device, non_blocking=True) if isinstance(value, Tensor) else value

    def _ready(self, batch: dict[str, Any], copied: torch.cuda.Event) -> dict[str, Any]:
        """The batch, safe to use on the current stream."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)
        for value in batch.values():
            if isinstance(value, Tensor):
                value.record_stream(stream)
        return batch


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all loaders, as the caching allocator keeps a pool of memory for each stream."""
    return torch.cuda.Stream(device)
