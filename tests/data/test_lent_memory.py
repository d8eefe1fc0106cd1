"""Batches in memory that workers use again: every image arrives as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtr_lab.data.images import Collate, ImageLoader, Lent, Skipped

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
