"""Each rank's share of the evaluation batches, of images in any order and of a stream."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from torch.utils.data import Dataset, IterableDataset

from mtr_lab.data.batches import Collate, ImageLoader
from mtr_lab.data.shard import ShardedEvaluation
from mtr_lab.errors import UserError

ENTRIES = [{"image": torch.zeros(3, 4, 4), "label": i, "id": str(i), "hash": ""} for i in range(13)]


class Anywhere(Dataset[Any]):
    def __len__(self) -> int:
        return len(ENTRIES)

    def __getitem__(self, index: int) -> Any:
        return ENTRIES[index]


class InTurn(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(ENTRIES)


class Data(LightningDataModule):
    def __init__(self, dataset: Any) -> None:
        super().__init__()
        self._dataset = dataset

    def test_dataloader(self) -> ImageLoader:
        return ImageLoader(self._dataset, batch_size=2, collate_fn=Collate((3, 4, 4)))


def share(dataset: Any, rank: int, ranks: int, limit: int | float) -> list[list[int]]:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(global_rank=rank, world_size=ranks, limit_test_batches=limit, strategy=strategy)
    sharded = ShardedEvaluation(Data(dataset), trainer)
    sharded.trainer = trainer
    assert trainer.limit_test_batches == 1.0  # the trainer must not apply it again
    return [batch["label"].tolist() for batch in sharded.test_dataloader()]


@pytest.mark.parametrize("dataset", [Anywhere(), InTurn()])
@pytest.mark.parametrize(("limit", "batches"), [(1.0, 7), (4, 4), (100, 7)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
def test_together_the_ranks_see_the_first_batches_once(
    dataset: Any, limit: int | float, batches: int, ranks: int
) -> None:
    whole = [list(range(first, min(first + 2, 13))) for first in range(0, 2 * batches, 2)]
    for rank in range(ranks):
        assert share(dataset, rank, ranks, limit) == whole[rank::ranks]


def test_a_share_of_a_stream_is_a_mistake_and_of_images_is_not() -> None:
    assert share(Anywhere(), 0, 1, 0.5) == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(UserError, match=r"0\.5 of a stream of unknown length: give a number of batches\.$"):
        share(InTurn(), 0, 1, 0.5)
