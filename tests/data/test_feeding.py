"""Batches in memory that workers use again, and batches on their way to a GPU: every image arrives as it was."""

import time
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from mtr_lab.data import batches as feeding
from mtr_lab.data.batches import Collate, CopiedAhead, ImageLoader, ReusedMemory
from mtr_lab.data.images import Skipped

SIZE = (3, 24, 24)


class Numbered(Dataset[Any]):
    """Image i is filled with i; every seventh cannot be read."""

    def __len__(self) -> int:
        return 203

    def __getitem__(self, index: int) -> dict[str, Any] | Skipped:
        if index % 7 == 3:
            return Skipped(str(index))
        return {"image": torch.full(SIZE, index, dtype=torch.uint8), "label": index, "id": str(index), "hash": ""}


def filled(low: int, count: int, size: tuple[int, ...] = SIZE, dtype: torch.dtype = torch.uint8) -> list[Tensor]:
    return [torch.full(size, low + i, dtype=dtype) for i in range(count)]


def test_memory_is_used_in_turn_and_replaced_where_it_does_not_fit() -> None:
    memory = ReusedMemory(2)
    first, second, third = (memory.stack(filled(10 * i, 4)) for i in range(3))
    assert first.is_shared()
    assert first.data_ptr() == third.data_ptr() != second.data_ptr()
    assert torch.equal(second, torch.stack(filled(10, 4)))
    assert torch.equal(third, torch.stack(filled(20, 4)))
    for group in (filled(0, 3), filled(0, 5), filled(0, 5, (3, 8, 8)), filled(0, 5, dtype=torch.float32)):
        for _ in range(3):
            assert torch.equal(memory.stack(group), torch.stack(group))


def check(batches: list[dict[str, Any]]) -> None:
    labels = torch.cat([batch["label"] for batch in batches])
    assert sorted(labels.tolist()) == [i for i in range(203) if i % 7 != 3]
    assert sum(len(batch["skipped"]) for batch in batches) == 29
    for batch in batches:
        assert torch.equal(batch["image"], batch["label"].byte()[:, None, None, None].expand(-1, *SIZE))


@pytest.fixture
def pins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device to pin for, whose pinning is a copy that takes its time: workers are ahead of it as far as they can."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)

    def pin_memory(tensor: Tensor) -> Tensor:
        time.sleep(0.005)
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)


@pytest.mark.usefixtures("pins")
@pytest.mark.parametrize("persistent_workers", [False, True])
def test_workers_of_a_loader_that_pins_use_their_memory_again(persistent_workers: bool) -> None:
    options = {"num_workers": 3, "pin_memory": True, "persistent_workers": persistent_workers}
    loader = ImageLoader(Numbered(), batch_size=5, collate_fn=Collate(SIZE), **options)
    assert loader.collate_fn.memory is not None
    check(list(loader))
    next(iter(loader))  # and goes on no further
    check(list(loader))


class Stream(IterableDataset[Any]):
    """The same images, all but a few of them from the first worker."""

    def __iter__(self) -> Iterator[Any]:
        images, worker = Numbered(), cast(Any, get_worker_info())
        cut = len(images) - 5 * (worker.num_workers - 1)
        start, end = (0, cut) if worker.id == 0 else (cut + 5 * (worker.id - 1), cut + 5 * worker.id)
        return (images[i] for i in range(start, end))


@pytest.mark.usefixtures("pins")
def test_workers_of_a_stream_do_not() -> None:
    loader = ImageLoader(Stream(), batch_size=5, num_workers=4, collate_fn=Collate(SIZE), pin_memory=True)
    assert loader.collate_fn.memory is None
    check(list(loader))


@pytest.mark.usefixtures("pins")
def test_nor_those_of_a_loader_that_does_not_pin() -> None:
    pinning = ImageLoader(Numbered(), num_workers=2, collate_fn=Collate(SIZE), pin_memory=True)
    for workers in (0, 2):
        loader = ImageLoader(Numbered(), batch_size=5, num_workers=workers, collate_fn=pinning.collate_fn)
        assert loader.collate_fn.memory is None
        check(list(loader))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_images_arrive_as_they_were() -> None:
    loader = ImageLoader(Numbered(), batch_size=5, num_workers=2, collate_fn=Collate(SIZE), pin_memory=True)
    assert loader.collate_fn.memory is not None
    batches = list(loader)
    assert all(batch["image"].is_pinned() for batch in batches)
    check(batches)
    batches = []
    for batch in CopiedAhead(loader, torch.device("cuda", 0)):
        assert batch["image"].is_cuda
        batches.append({**batch, "image": (batch["image"] + 0).cpu()})
    check(batches)


class FakeStream:
    """Stands for a stream of a GPU, of which it notes what is asked."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def __enter__(self) -> None:
        self.notes.append("on the copying stream")

    def __exit__(self, *error: object) -> None:
        self.notes.append("off it")

    def record_event(self) -> int:
        self.notes.append("copied")
        return self.notes.count("copied")

    def wait_event(self, number: int) -> None:
        self.notes.append(f"wait for {number}")


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_batch_is_copied_while_the_one_before_is_in_use(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    stream = FakeStream(notes)
    monkeypatch.setattr(feeding, "_copying_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: notes.append(f"keep {self[0]}"), raising=False)
    loader = [{"image": torch.full((2,), i), "label": i} for i in range(batches)]
    ahead = CopiedAhead(loader, torch.device("cpu"))
    assert len(ahead) == batches
    for i, batch in enumerate(ahead):
        assert batch["image"].tolist() == [i, i]
        assert batch["label"] == i
        notes.append(f"use {i}")
    copy = ["on the copying stream", "copied", "off it"]
    give = [[f"wait for {i + 1}", f"keep {i}", f"use {i}"] for i in range(3)]
    three = [*copy, *copy, *give[0], *copy, *give[1], *give[2]]
    assert notes == {0: [], 1: [*copy, *give[0]], 3: three}[batches]
