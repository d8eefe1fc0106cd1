"""Distributed evaluation: every rank evaluates a share of the batches that a single process would evaluate."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

from lightning import LightningDataModule, Trainer
from torch.utils.data import IterableDataset, Sampler

from mtr_lab.data.batches import Prefetcher
from mtr_lab.errors import UserError


class EvaluationImages(Protocol):
    """What an evaluation runs over, a ``LightningDataModule``."""

    trainer: Trainer | None

    def test_dataloader(self) -> Iterable[dict[str, Any]]:
        """The evaluation images, in the same order and batches every time."""
        ...

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Lightning's hook: the batch on the device as the model expects it."""
        ...


class ShardedEvaluation(LightningDataModule):
    """Rank r of w evaluates batches r, r + w, r + 2w, … of ``data``; together the ranks see every image once.

    Batches are neither padded nor split, so the results for an image do not depend on w. A rank may get no batch.
    On a GPU, batches are prefetched.

    Args:
        data: its ``test_dataloader`` is an ``ImageLoader`` with the same batches in every process.
        trainer: provides rank and world size. Its ``limit_test_batches`` would limit each rank; it is reset, and
            applied to all ranks together here.

    Raises:
        UserError: (from ``test_dataloader``) the limit leaves no batch, or is a share of a stream of unknown length.
    """

    def __init__(self, data: EvaluationImages, trainer: Trainer) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._data = data
        self._rank, self._world_size = trainer.global_rank, trainer.world_size
        self._limit, trainer.limit_test_batches = trainer.limit_test_batches, 1.0

    def test_dataloader(self) -> Iterable[Any]:
        self._data.trainer = self.trainer
        assert self.trainer is not None
        batches, device = self._share(), self.trainer.strategy.root_device
        return Prefetcher(batches, device) if device.type == "cuda" else batches

    def _share(self) -> Iterable[Any]:
        loader: Any = self._data.test_dataloader()
        if isinstance(loader.dataset, IterableDataset):
            return _EveryNth(loader, self._rank, self._stop(None), self._world_size)
        assert loader.batch_sampler is not None
        batches = _EveryNth(loader.batch_sampler, self._rank, self._stop(len(loader)), self._world_size)
        return type(loader)(
            loader.dataset,
            batch_sampler=batches,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._data.on_after_batch_transfer(batch, dataloader_idx)

    def _stop(self, batches: int | None) -> int | None:
        """Number of batches to evaluate out of ``batches``; ``None`` if the length is unknown."""
        limit = self._limit
        if isinstance(limit, int) and not isinstance(limit, bool):
            return limit if batches is None else min(limit, batches)
        if batches is None and limit == 1:
            return None
        if batches is None or int(batches * limit) == 0:
            of = "a stream of unknown length" if batches is None else f"{batches} batches"
            share = "" if batches is None else f", or a share of at least 1/{batches}"
            raise UserError(f"trainer.limit_test_batches={limit} of {of}: give a number of batches{share}.")
        return int(batches * limit)


class _EveryNth(Sampler[Any]):
    """Items ``start``, ``start + step``, … before ``stop``."""

    def __init__(self, items: Iterable[Any], start: int, stop: int | None, step: int) -> None:
        self._items, self._start, self._stop, self._step = items, start, stop, step

    def __iter__(self) -> Iterator[Any]:
        return islice(self._items, self._start, self._stop, self._step)

    def __len__(self) -> int:
        if self._stop is None:
            raise TypeError("the length of a stream is unknown")
        return len(range(self._start, self._stop, self._step))
