"""Batches through a ring buffer and prefetched batches: every image arrives unchanged."""

import os
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, get_worker_info

from mtr_lab.data import batches as batches_module
from mtr_lab.data.batches import Collate, ImageLoader, PinnedRing, Prefetcher
from mtr_lab.data.images import Skipped
from mtr_lab.errors import UserError

SIZE = (3, 24, 24)


class Numbered(Dataset[Any]):
    """Image i is filled with the value i; every seventh image cannot be read."""

    def __len__(self) -> int:
        return 203

    def __getitem__(self, index: int) -> dict[str, Any] | Skipped:
        if index % 7 == 3:
            return Skipped(str(index))
        return {"image": torch.full(SIZE, index, dtype=torch.uint8), "label": index, "id": str(index), "hash": ""}


def filled(low: int, count: int, size: tuple[int, ...] = SIZE, dtype: torch.dtype = torch.uint8) -> list[Tensor]:
    return [torch.full(size, low + i, dtype=dtype) for i in range(count)]


def check(batches: list[dict[str, Any]]) -> None:
    labels = torch.cat([batch["label"] for batch in batches])
    assert sorted(labels.tolist()) == [i for i in range(203) if i % 7 != 3]
    assert sum(len(batch["skipped"]) for batch in batches) == 29
    for batch in batches:
        assert torch.equal(batch["image"], batch["label"].byte()[:, None, None, None].expand(-1, *SIZE))


class Runtime:
    """A fake of CUDA's runtime that records its calls."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.error = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.locked[address] = nbytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """The fake runtime, on a machine that seems to have a GPU."""
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    return runtime


def used_late(loader: ImageLoader) -> Iterator[dict[str, Any]]:
    """Batches, read after the workers have prefetched as far as they can."""
    for batch in loader.zero_copy():
        time.sleep(0.01)
        yield {key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()}


def memory_of(loader: ImageLoader) -> list[int]:
    return [batch["image"].data_ptr() for batch in loader.zero_copy()]


@pytest.mark.parametrize(
    ("workers", "ahead", "start"),
    [(1, 2, "fork"), (3, 2, "fork"), (4, 1, "fork"), pytest.param(1, 2, "spawn", marks=pytest.mark.slow)],
)
def test_workers_fill_a_ring(workers: int, ahead: int, start: str, runtime: Runtime) -> None:
    options = {"num_workers": workers, "prefetch_factor": ahead, "multiprocessing_context": start}
    loader = ImageLoader(Numbered(), batch_size=5, collate_fn=Collate(SIZE), pin_memory=True, **options)
    check(list(used_late(loader)))
    if start == "spawn":
        return  # starting more processes takes long
    next(loader.zero_copy())  # a consumer that stops early
    check(list(used_late(loader)))
    assert not runtime.locked  # unlocked again


def test_a_ring_is_no_longer_than_needed_and_page_locked_as_long_as_it_is_used(runtime: Runtime) -> None:
    options = {"num_workers": 2, "pin_memory": True, "collate_fn": Collate(SIZE)}
    bytes_of_a_slot = 5 * 3 * 24 * 24
    loader = ImageLoader(Numbered(), batch_size=5, **options)
    places = memory_of(loader)
    assert len(places) == 41
    assert len(set(places)) == 5
    for images, slots in ((203, 5), (11, 3)):
        short = ImageLoader(Subset(Numbered(), range(images)), batch_size=5, **options)
        batches = short.zero_copy()
        address = next(batches)["image"].data_ptr()
        assert runtime.locked == {address: slots * bytes_of_a_slot}
        batches.close()
        assert not runtime.locked


def test_another_process_unlocks_nothing(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = PinnedRing(2, 5, SIZE)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    del ring
    assert runtime.locked


def test_memory_that_cannot_be_page_locked_is_an_error(runtime: Runtime) -> None:
    runtime.error = 2
    with pytest.raises(RuntimeError, match="memory"):
        PinnedRing(2, 5, SIZE)


def test_too_little_shared_memory_is_the_users_to_change(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(memory: Tensor) -> Tensor:
        raise RuntimeError("No space left on device (28)")

    monkeypatch.setattr(Tensor, "share_memory_", full)
    with pytest.raises(UserError, match=r"(?s)13 batches of 256 images, 477 MiB,.*num_workers.*No space left"):
        PinnedRing(13, 256, (3, 224, 224))


def test_more_images_than_a_slot_holds_are_an_error(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="6 images for a slot of 5"):
        PinnedRing(2, 5, SIZE).put(list(torch.zeros(6, *SIZE, dtype=torch.uint8)))


class Unreadable(Numbered):
    def __getitem__(self, index: int) -> Any:
        entry = super().__getitem__(index)
        return Skipped(str(index)) if 40 <= index < 70 else UserError("image 150") if index == 150 else entry


def test_batches_without_an_image_keep_their_turn_and_mistakes_are_raised(runtime: Runtime) -> None:
    loader = ImageLoader(Unreadable(), batch_size=5, num_workers=3, collate_fn=Collate(SIZE), pin_memory=True)
    batches = []
    with pytest.raises(UserError, match="image 150"):
        batches.extend(used_late(loader))
    assert [len(batch["label"]) for batch in batches[7:15]] == [4, 0, 0, 0, 0, 0, 0, 4]
    for batch in batches:
        assert batch["image"].shape == (len(batch["label"]), *SIZE)
        assert torch.equal(batch["image"][:, 0, 0, 0], batch["label"].byte())


class Stream(IterableDataset[Any]):
    """The same images as a stream; the first worker yields nearly all of them."""

    def __iter__(self) -> Iterator[Any]:
        images, worker = Numbered(), cast(Any, get_worker_info())
        cut = len(images) - 5 * (worker.num_workers - 1)
        start, end = (0, cut) if worker.id == 0 else (cut + 5 * (worker.id - 1), cut + 5 * worker.id)
        return (images[i] for i in range(start, end))


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        (Stream(), {"num_workers": 4}),
        (Numbered(), {"num_workers": 2, "persistent_workers": True}),
        (Numbered(), {"num_workers": 2, "in_order": False}),
        (Numbered(), {"num_workers": 2, "pin_memory": False}),
        (Numbered(), {"num_workers": 0}),
    ],
)
def test_no_ring_where_turns_are_unknown_or_nobody_waits(
    dataset: Dataset[Any], options: dict[str, Any], runtime: Runtime
) -> None:
    loader = ImageLoader(dataset, batch_size=5, collate_fn=Collate(SIZE), **{"pin_memory": True, **options})
    batches = [next(pinned := loader.zero_copy())]
    assert not runtime.locked
    batches.extend(pinned)
    check(batches)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_images_arrive_as_they_were() -> None:
    loader = ImageLoader(Numbered(), batch_size=5, num_workers=2, collate_fn=Collate(SIZE), pin_memory=True)
    assert all(batch["image"].is_pinned() for batch in loader.zero_copy())
    assert len(set(memory_of(loader))) == 5
    for _ in range(2):
        batches = []
        for batch in Prefetcher(loader, torch.device("cuda", 0)):
            assert batch["image"].is_cuda
            assert batch["label"].is_cuda
            batches.append({**batch, **{key: (batch[key] + 0).cpu() for key in ("image", "label")}})
        check(batches)


class FakeEvent(int):
    notes: list[str]

    def synchronize(self) -> None:
        self.notes.append(f"{int(self)} is done")


class FakeStream:
    """A fake of a CUDA stream that records its calls."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def __enter__(self) -> None:
        self.notes.append("on the copying stream")

    def __exit__(self, *error: object) -> None:
        self.notes.append("off it")

    def record_event(self) -> FakeEvent:
        self.notes.append("copied")
        event = FakeEvent(self.notes.count("copied"))
        event.notes = self.notes
        return event

    def wait_event(self, number: int) -> None:
        self.notes.append(f"wait for {number}")


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_batch_is_copied_while_the_one_before_is_in_use(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    stream = FakeStream(notes)
    monkeypatch.setattr(batches_module, "_copying_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: notes.append(f"keep {self.sum()}"), raising=False)
    loader = [{"image": torch.full((2,), i), "label": torch.tensor(10 * i), "id": i} for i in range(batches)]
    ahead = Prefetcher(loader, torch.device("cpu"))
    assert len(ahead) == batches
    for i, batch in enumerate(ahead):
        assert batch["image"].tolist() == [i, i]
        assert (batch["label"], batch["id"]) == (10 * i, i)
        notes.append(f"use {i}")
    copy, done = ["on the copying stream", "copied", "off it"], [[f"{i + 1} is done"] for i in range(3)]
    give = [[f"wait for {i + 1}", f"keep {2 * i}", f"keep {10 * i}", f"use {i}"] for i in range(3)]
    three = [*copy, *done[0], *copy, *give[0], *done[1], *copy, *give[1], *done[2], *give[2]]
    assert notes == {0: [], 1: [*copy, *done[0], *give[0]], 3: three}[batches]
    if batches == 3:  # a consumer that stops early leaves no pending copy
        notes.clear()
        left = iter(ahead)
        next(left)
        left.close()
        assert notes == [*copy, *done[0], *copy, *give[0][:-1], *done[1]]
