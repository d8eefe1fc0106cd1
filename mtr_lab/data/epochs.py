"""The order and the augmentation of training images as functions of the seed, the epoch and the image."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from mtr_lab.data.images import Entry


class EpochShuffle(Sampler[tuple[int, int]]):
    """(epoch, index of an image) in a random order that is a function of the seed and the epoch.

    Lightning calls ``set_epoch``. Rank r of w gets the r-th of w equal shares of every batch; what does not fill a
    batch is left out.

    Args:
        indices: of the images.
        batch_size: images in a batch, of all ranks together; a multiple of ``ranks``.
        seed: of the order.
        rank, ranks: of this process, and how many there are.

    Attributes:
        share: images of a batch that this rank gets.
    """

    def __init__(self, indices: Sequence[int], batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self._indices, self._seed, self._rank, self._ranks = torch.tensor(indices), seed, rank, ranks
        self.share = batch_size // ranks
        self._batches = len(indices) // batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self._batches * self.share

    def order(self) -> torch.Tensor:
        """The indices of this rank's images in this epoch, ``share`` a batch, (batches * share,) int64."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        shuffled = self._indices[torch.randperm(len(self._indices), generator=generator)]
        whole = shuffled[: len(self) * self._ranks].view(self._batches, self._ranks, self.share)
        return whole[:, self._rank].flatten()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in self.order().tolist())


class InEpoch(Dataset[Entry]):
    """Augmented images by (epoch, index): the same whenever and by whichever worker they are made.

    The random numbers of the process are left as they were.
    """

    def __init__(self, images: Dataset[Entry], seed: int) -> None:
        self._images, self._seed = images, seed

    def __getitem__(self, key: tuple[int, int]) -> Entry:
        epoch, index = key
        with random_numbers(self._seed, epoch, index):
            return self._images[index]


@contextmanager
def random_numbers(*key: int) -> Iterator[None]:
    """Within the block Python, NumPy and PyTorch (on the CPU) draw the random numbers that belong to ``key``."""
    number = int(np.random.SeedSequence(key).generate_state(1)[0])
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    try:
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002 (timm's transforms draw from the global generators)
        torch.default_generator.manual_seed(number)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.default_generator.set_state(before[2])
