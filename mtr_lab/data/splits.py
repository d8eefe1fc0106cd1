"""Training, held-out, evaluation and calibration images of a dataset with two splits, and their loaders."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset, Subset

from mtr_lab.data.batches import ImageLoader
from mtr_lab.data.epochs import EpochShuffle, InEpoch
from mtr_lab.data.images import Entry, Remarks
from mtr_lab.errors import UserError, check_number, unknown


class SplitSource(Protocol):
    """The images of one split, in random access."""

    def __len__(self) -> int: ...
    def id(self, index: int) -> str: ...
    def fingerprint(self) -> str: ...


Source = TypeVar("Source", bound=SplitSource)


class SplitDataModule(LightningDataModule, ABC, Generic[Source]):
    """Base of the data modules: a training split, part of which may be held out, and an evaluation split.

    A subclass opens splits, preprocesses their images, and collates them (``_collate``). Its constructor opens the
    evaluation split, so that mistakes show before a model is loaded; ``setup("fit")`` or the first use opens the
    training split.

    Args:
        name: the dataset's name in results and messages.
        train_split, test_split: names of the splits.
        holdout: share of the training images held out for validation, chosen by a hash of their ids.
        batch_size: number of images in a batch; in training, on all devices together.
        num_workers: number of processes that decode, at most one per CPU.
        on_error: what to do with an image that cannot be decoded: ``"fail"``, or ``"skip"`` and report it.
        exif: ``"apply"`` turns images as their EXIF orientation says, ``"ignore"`` leaves them as they are stored.
        seed: determines the order and the augmentation of the training images.

    Raises:
        UserError: an option is invalid.
    """

    name: str
    _collate: Callable[[Sequence[Entry]], Any]

    def __init__(
        self,
        *,
        name: str,
        train_split: str = "train",
        test_split: str = "val",
        holdout: float = 0.0,
        batch_size: int = 16,
        num_workers: int = 0,
        on_error: str = "fail",
        exif: str = "apply",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if on_error not in ("fail", "skip"):
            raise unknown("dataset.on_error", on_error, ["fail", "skip"])
        if exif not in ("apply", "ignore"):
            raise unknown("dataset.exif", exif, ["apply", "ignore"])
        check_number("dataset.holdout", holdout, float, 0, 0.99)
        check_number("dataset.batch_size", batch_size, int, 1, 2**20)
        check_number("dataset.num_workers", num_workers, int, 0)
        self.name = str(name)
        self._train_split, self._test_split = str(train_split), str(test_split)
        self._holdout, self._on_error, self._seed = holdout, on_error, seed
        self._exif, self._remarks = exif, Remarks()
        self._batch_size, self._num_workers = batch_size, min(num_workers, os.cpu_count() or 1)

    @abstractmethod
    def _open(self, split: str, training: bool) -> Source:
        """The images of a split, for training or evaluation.

        Raises:
            UserError: the split has no images, or wrong annotations.
        """

    @abstractmethod
    def _training_images(self, augmented: bool) -> Dataset[Entry]:
        """Entries of all training images, including the held-out ones: augmented, or preprocessed as for evaluation."""

    @abstractmethod
    def _evaluation_images(self) -> Dataset[Entry]:
        """Entries of the evaluation images."""

    @cached_property
    def _test_source(self) -> Source:
        return self._open(self._test_split, training=False)

    @cached_property
    def _train_source(self) -> Source:
        return self._open(self._train_split, training=True)

    def _holdout_key(self, index: int) -> str:
        """The string whose hash decides whether a training image is held out."""
        return self._train_source.id(index)

    def fingerprint(self) -> str:
        """A hash of the evaluation images and their labels, computed without decoding images."""
        return self._test_source.fingerprint()

    def setup(self, stage: str) -> None:
        """Open the training images if ``stage`` is ``"fit"``, so that mistakes in them show before training."""
        if stage == "fit":
            self._training_images(augmented=True)

    def train_dataloader(self) -> ImageLoader:
        """The training images that are not held out, shuffled and augmented, in full batches.

        Order and augmentation are functions of the seed, the epoch and the image. Of several devices each has an equal
        share of every batch, so that a step sees the same images on any number of them.

        Raises:
            UserError: they are fewer than a batch.
        """
        sampler = self._training_sampler(self._training_indices(held_out=False))
        return self._loader(
            InEpoch(self._training_images(augmented=True), self._seed),
            batch_size=sampler.share,
            sampler=sampler,
            drop_last=True,
            persistent_workers=self._num_workers > 0,
            generator=torch.Generator().manual_seed(self._seed),  # for the seeds of the workers
        )

    def _training_sampler(self, kept: Sequence[int]) -> EpochShuffle:
        """Orders images for this process, one of those that the trainer counts."""
        if len(kept) < self._batch_size:
            raise UserError(
                f"dataset.batch_size={self._batch_size} is more than the {len(kept)} training images: lower it."
            )
        rank, ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        return EpochShuffle(kept, self._batch_size, self._seed, rank, ranks)

    def val_dataloader(self) -> ImageLoader | list[ImageLoader]:
        """The held-out training images, preprocessed as for evaluation; no loader if ``holdout`` is 0.

        Raises:
            UserError: ``holdout`` is too small for a single image.
        """
        if not self._holdout:
            return []
        held_out = self._training_indices(held_out=True)
        if not held_out:
            raise UserError(f"dataset.holdout={self._holdout} holds out no training image: raise it.")
        dataset = Subset(self._training_images(augmented=False), held_out)
        return self._loader(dataset, persistent_workers=self._num_workers > 0)

    def test_dataloader(self) -> ImageLoader:
        """The evaluation images, in the same order and batches every time."""
        return self._loader(self._evaluation_images())

    def calibration_images(self, count: int) -> Tensor:
        """Training images, evenly spaced over the split and preprocessed as for evaluation, to choose settings on.

        Returns:
            (count, 3, H, W); fewer images if the split is smaller, or if some cannot be decoded.

        Raises:
            UserError: the training split is missing, empty, or the evaluation split.
        """
        if self._train_split == self._test_split:
            raise UserError(
                f"dataset.train_split and dataset.test_split are both {self._test_split}: settings chosen on training "
                "images cannot be evaluated on the same images. Set dataset.train_split to another split."
            )
        batches = list(self._calibration_batches(count))
        if not any(len(batch["id"]) for batch in batches):
            tried = sum(len(batch["skipped"]) for batch in batches)
            raise UserError(f"none of {tried} training images of {self.name} could be read.")
        return torch.cat([batch["image"] for batch in batches])[:count]

    def _calibration_batches(self, count: int) -> Iterable[dict[str, Any]]:
        """Batches with ``count`` training images, or with all if they are fewer."""
        chosen = subsample(len(self._train_source), count)
        return self._loader(Subset(self._training_images(augmented=False), chosen))

    def _training_indices(self, held_out: bool) -> list[int]:
        indices = range(len(self._train_source))
        return [i for i in indices if is_held_out(self._holdout_key(i), self._holdout) == held_out]

    def _loader(self, dataset: Dataset[Entry], **options: Any) -> ImageLoader:
        return ImageLoader(
            dataset,
            collate_fn=self._collate,
            pin_memory=torch.cuda.is_available(),
            **{"batch_size": self._batch_size, "num_workers": self._num_workers, **options},
        )


def subsample(length: int, count: int) -> list[int]:
    """``count`` evenly spaced indices below ``length``, starting at 0; all of them if ``length`` is smaller."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


def is_held_out(key: str, share: float) -> bool:
    """Whether a hash of ``key`` falls into the share: independent of machine, order and number of images."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64
