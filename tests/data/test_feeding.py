"""Batches in memory that workers use again, and batches on their way to a GPU: every image arrives as it was."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtr_lab.data.images import Collate, CopiedAhead, ImageLoader, Lent, Skipped

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
    lent = Lent(2)
    first, second, third = (lent.stack(filled(10 * i, 4)) for i in range(3))
    assert first.is_shared()
    assert first.data_ptr() == third.data_ptr() != second.data_ptr()
    assert torch.equal(second, torch.stack(filled(10, 4)))
    assert torch.equal(third, torch.stack(filled(20, 4)))
    for images in (filled(0, 3), filled(0, 5), filled(0, 5, (3, 8, 8)), filled(0, 5, dtype=torch.float32)):
        for _ in range(3):
            assert torch.equal(lent.stack(images), torch.stack(images))


def check(batches: list[dict[str, Any]]) -> None:
    labels = torch.cat([batch["label"] for batch in batches])
    assert labels.tolist() == [i for i in range(203) if i % 7 != 3]
    assert sum(len(batch["skipped"]) for batch in batches) == 29
    for batch in batches:
        assert torch.equal(batch["image"], batch["label"].byte()[:, None, None, None].expand(-1, *SIZE))


def test_what_is_copied_before_the_next_batch_is_asked_for_is_right() -> None:
    collate = Collate(SIZE, Lent(3))
    loader = ImageLoader(Numbered(), batch_size=5, num_workers=2, collate_fn=collate)
    check([{**batch, "image": batch["image"].clone()} for batch in loader])


@pytest.mark.parametrize("workers", [0, 2])
def test_without_a_copy_no_memory_is_lent(workers: int) -> None:
    loader = ImageLoader(Numbered(), batch_size=5, num_workers=workers, collate_fn=Collate(SIZE))
    assert loader.collate_fn.lent is None
    check(list(loader))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pinned_batches_are_copies() -> None:
    loader = ImageLoader(Numbered(), batch_size=5, num_workers=2, collate_fn=Collate(SIZE), pin_memory=True)
    assert loader.collate_fn.lent is not None
    batches = list(loader)
    assert all(batch["image"].is_pinned() for batch in batches)
    check(batches)


class Streams:
    """Stands for ``torch.cuda``: notes in which order things are asked for."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def Stream(self, device: torch.device) -> "Streams":
        return self

    def stream(self, stream: "Streams") -> AbstractContextManager[None]:
        return nullcontext()

    def current_stream(self, device: torch.device) -> "Streams":
        return self

    def record_event(self) -> int:
        self.notes.append("copy")
        return self.notes.count("copy")

    def wait_event(self, number: int) -> None:
        self.notes.append(f"wait for {number}")


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_batch_is_copied_while_the_one_before_is_in_use(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams()
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(streams, name))
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None, raising=False)
    loader = [{"image": torch.full((2,), i), "label": i} for i in range(batches)]
    found = []
    ahead = CopiedAhead(cast(ImageLoader, loader), torch.device("cpu"))
    for batch in ahead:
        streams.notes.append(f"use {batch['label']}")
        found.append(batch)
    assert len(ahead) == batches
    assert [batch["image"].tolist() for batch in found] == [[i, i] for i in range(batches)]
    expected = ["copy", "copy", "wait for 1", "use 0", "copy", "wait for 2", "use 1", "wait for 3", "use 2"]
    assert streams.notes == {0: [], 1: ["copy", "wait for 1", "use 0"], 3: expected}[batches]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_made_ahead_have_arrived() -> None:
    loader = ImageLoader(Numbered(), batch_size=5, num_workers=2, collate_fn=Collate(SIZE), pin_memory=True)
    batches = []
    for batch in CopiedAhead(loader, torch.device("cuda", 0)):
        assert batch["image"].is_cuda
        batches.append({**batch, "image": (batch["image"] + 0).cpu()})
    check(batches)
