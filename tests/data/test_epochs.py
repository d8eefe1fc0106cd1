"""Order and augmentation of training images are functions of the seed, the epoch and the image alone."""

import random
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mtr_lab.data.epochs import EpochShuffle, InEpoch


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_every_batch(ranks: int) -> None:
    indices = list(range(100, 120))

    def batches(epoch: int, rank: int, ranks: int) -> list[list[int]]:
        sampler = EpochShuffle(indices, 6, seed=1, rank=rank, ranks=ranks)
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert len(keys) == len(sampler) == 18 // ranks
        assert {key[0] for key in keys} == {epoch}
        return [[index for _, index in keys[i : i + sampler.share]] for i in range(0, len(keys), sampler.share)]

    for epoch in (0, 4):
        shares = [batches(epoch, rank, ranks) for rank in range(ranks)]
        together = [list(chain(*batch)) for batch in zip(*shares, strict=True)]
        assert together == batches(epoch, 0, 1)
        assert len(set(chain(*together))) == 18
    assert batches(0, 0, 1) != batches(1, 0, 1)


class Draws(Dataset):
    """Of an index: a number from each of the generators that transforms draw from."""

    def __getitem__(self, index: int) -> dict[str, float]:
        return {"index": index, "numbers": (random.random(), np.random.rand(), torch.rand(()).item())}  # noqa: NPY002


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_is_augmented_the_same_by_whichever_worker(num_workers: int) -> None:
    keys = [(epoch, index) for epoch in (0, 1) for index in (3, 1, 2)]
    images = InEpoch(Draws(), 7)
    loader = DataLoader(images, sampler=keys, batch_size=1, collate_fn=lambda batch: batch[0], num_workers=num_workers)
    drawn = {key: entry["numbers"] for key, entry in zip(keys, loader, strict=True)}
    assert len(set(drawn.values())) == len(keys)
    assert drawn == {key: InEpoch(Draws(), 7)[key]["numbers"] for key in reversed(keys)}
    assert drawn[0, 1] != InEpoch(Draws(), 8)[0, 1]["numbers"]


def test_the_random_numbers_of_the_process_are_left_alone() -> None:
    def draw() -> tuple[float, float, float]:
        return Draws()[0]["numbers"]

    def seed() -> None:
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)

    seed()
    expected = [draw(), draw()]
    seed()
    first = draw()
    InEpoch(Draws(), 7)[0, 1]
    assert [first, draw()] == expected
