"""Image classification data for Lightning: training, held-out and evaluation images of one dataset."""

import hashlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset, Sampler, Subset

from mtr_lab.data.cache import CachedImages
from mtr_lab.data.classes import map_classes, name_classes
from mtr_lab.data.folders import FolderSource, evaluation_directory, find_imagenette, find_root, training_directory
from mtr_lab.data.images import Collate, ImageLoader, Images, ImageSource, ImageStream, Preparation
from mtr_lab.data.timm_sources import StreamSource, open_timm
from mtr_lab.errors import UserError, check_number, unknown


class ImageDataModule(LightningDataModule):
    """Images of ImageFolder directories or of anything timm opens, as batches that a classifier takes.

    Everything that can be wrong with the evaluation images, the class names and the options is found here, before a
    model exists; the training images are opened by ``setup("fit")`` or at first use. Batches are described at
    :class:`~mtr_lab.data.images.Collate`; labels are the model's outputs. Evaluation images are preprocessed by
    ``timm.data.create_transform(**data_config)``: resize to size / crop_pct, centre crop; ``normalise`` does the rest
    on the device, which therefore receives one byte a value. A Lightning trainer calls it by itself.

    Args:
        name: what the dataset is called in results and messages.
        data_config: timm's ``input_size`` (3, H, W), ``interpolation``, ``mean``, ``std``, ``crop_pct``.
        root: directory with ``train/`` and ``val/`` directories of class folders, or, for evaluation only, of class
            folders; ``pkg://package/path`` inside an installed package. Other sources take it as timm does.
        source: ``"imagefolder"``; ``"imagenette"``, which downloads what is not there; or a timm dataset name such as
            ``"hfds/ILSVRC/imagenet-1k"`` or ``"wds/imagenet"``.
        classes: names of labels 0, 1, 2 … where the dataset does not say them itself, or ``"imagenet-1k"``.
        train_split, test_split: directories below ``root``, or names of the source's splits.
        holdout: share of the training images kept for validation while training, chosen by a hash of their ids.
        batch_size: images in a batch.
        num_workers: processes that decode, at most one a CPU, and one for the evaluation of a stream, whose order
            they would change.
        on_error: ``"fail"`` at an image that cannot be decoded, or ``"skip"`` it and say so in the batch.
        cache: directory that keeps the evaluation images as they are after resize and crop, so that they are decoded
            once and for all; see :class:`~mtr_lab.data.cache.CachedImages`.
        model_classes: class names in the order of the model's outputs, if known.
        num_classes: how many outputs the model has; ``None``: as many as the dataset has classes.
        train_transform: options of ``timm.data.create_transform`` for training (``scale``, ``auto_augment``, …).
        seed: fixes the order of the training images.

    Attributes:
        class_names: names of the labels in the batches, if known.
        num_classes: how many outputs the labels count; ``None`` if neither model nor dataset says.
        num_images: how many evaluation images there are; ``None`` if the source does not know.

    Raises:
        UserError: anything above is not as expected.
    """

    name: str

    def __init__(
        self,
        *,
        name: str,
        data_config: Mapping[str, Any],
        root: str | None = None,
        source: str = "imagefolder",
        classes: str | Sequence[str] | None = None,
        train_split: str = "train",
        test_split: str = "val",
        holdout: float = 0.0,
        batch_size: int = 50,
        num_workers: int = 0,
        on_error: str = "fail",
        cache: str | None = None,
        model_classes: Sequence[str] | None = None,
        num_classes: int | None = None,
        train_transform: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if on_error not in ("fail", "skip"):
            raise unknown("dataset.on_error", on_error, ["fail", "skip"])
        check_number("dataset.holdout", holdout, float, 0, 0.99)
        check_number("dataset.batch_size", batch_size, int, 1)
        check_number("dataset.num_workers", num_workers, int, 0)
        if not isinstance(classes, str | Sequence | None):
            raise UserError(f"dataset.classes={classes}: expected a list of names, or imagenet-1k.")
        self.name = str(name)
        self._root = None if root is None else str(root)  # a directory may be called 5, which YAML takes for a number
        self._source = str(source)
        self._classes = classes
        self._train_split = str(train_split)
        self._test_split = str(test_split)
        self._holdout = holdout
        self._batch_size = batch_size
        self._num_workers = min(num_workers, os.cpu_count() or 1)
        self._on_error = on_error
        self._seed = seed

        self._collate = Collate(tuple(data_config["input_size"]))
        self._mean, self._std = data_config["mean"], data_config["std"]
        self._eval_transform = create_transform(**data_config, is_training=False, normalize=False)  # to uint8
        self._train_transform = _training_transform(data_config, {} if train_transform is None else train_transform)

        self._test_source = self._open(self._test_split, training=False)
        self._cache = None if cache is None else Path(str(cache)).expanduser()
        if self._cache is not None and isinstance(self._test_source, StreamSource):
            raise UserError(
                f"dataset.cache={cache}: the images of the stream {source} cannot be kept, as only their order tells "
                "them apart. Set dataset.cache=null, or choose a source with random access such as hfds/."
            )
        if holdout and isinstance(self._test_source, StreamSource):
            raise UserError(
                f"dataset.holdout={holdout}: nothing can be held out of the stream {source}, as its order changes. "
                "Set dataset.holdout=0, or choose a source with random access such as hfds/."
            )
        self._test_classes = name_classes(self._test_source.classes, classes)
        self.class_names = model_classes or self._test_classes
        if num_classes is None and self.class_names is not None:
            num_classes = len(self.class_names)
        self.num_classes = num_classes
        self.num_images = self._test_source.num_images
        self._test_labels: list[int] | None = None
        if num_classes is not None:
            self._test_labels = map_classes(self._test_classes, model_classes, num_classes)

    def identity(self) -> str:
        """A hash of the evaluation images that is cheap to have and changes when they do."""
        return self._test_source.identity()

    def normalise(self, images: Tensor) -> Tensor:
        """What the model takes, (B, 3, H, W) float32, of uint8 evaluation images of that shape, on their device."""
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (self._mean, self._std))
        return images.float().div_(255).sub_(mean).div_(std)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Lightning's hook: evaluation images are normalised on the device, in the trainer's precision."""
        if batch["image"].dtype == torch.uint8:
            assert self.trainer is not None
            batch["image"] = self.trainer.precision_plugin.convert_input(self.normalise(batch["image"]))
        return batch

    def setup(self, stage: str) -> None:
        """Open the training images if ``stage`` is ``"fit"``, so that what is wrong with them shows at once."""
        if stage == "fit":
            _ = self._train_source, self._train_labels

    def train_dataloader(self) -> ImageLoader:
        """The training images that are not held out, shuffled and augmented, in full batches."""
        dataset = self._dataset(self._train_source, self._train_transform, self._train_labels, training=True)
        options: dict[str, Any] = {"drop_last": True, "persistent_workers": self._num_workers > 0}
        if isinstance(self._train_source, StreamSource):
            self._train_source.split_over(self._num_workers)
            return self._loader(dataset, self._num_workers, **options)
        kept = self._training_indices(held_out=False)
        if len(kept) < self._batch_size:
            raise UserError(
                f"dataset.batch_size={self._batch_size} is more than the {len(kept)} training images: lower it."
            )
        options["generator"] = torch.Generator().manual_seed(self._seed)  # of the workers' seeds
        sampler = EpochShuffle(len(kept), self._seed)
        return self._loader(Subset(dataset, kept), self._num_workers, sampler=sampler, **options)

    def val_dataloader(self) -> ImageLoader | list[ImageLoader]:
        """The held-out training images, preprocessed as for evaluation; no loader where nothing is held out."""
        if not self._holdout:
            return []
        held_out = self._training_indices(held_out=True)
        if not held_out:
            raise UserError(f"dataset.holdout={self._holdout} holds out none of the training images: choose more.")
        dataset = self._dataset(self._train_source, self._eval_transform, self._train_labels)
        return self._loader(Subset(dataset, held_out), self._num_workers, persistent_workers=self._num_workers > 0)

    def test_dataloader(self) -> ImageLoader:
        """The evaluation images, in the same order and batches every time.

        With a cache, the first call builds it.
        """
        if not isinstance(self._test_source, StreamSource):
            return self._loader(self._test_images, self._num_workers)
        num_workers = min(self._num_workers, 1)
        self._test_source.split_over(num_workers)
        return self._loader(self._test_images, num_workers)

    def probe_images(self, count: int) -> Tensor:
        """Training images, spread evenly over the split (a stream's first), preprocessed as for evaluation.

        For what is chosen on images and must not be chosen on those it is evaluated on.

        Returns:
            (count, 3, H, W) or, where there are fewer or some cannot be decoded, less.

        Raises:
            UserError: there are no training images, or they are the evaluation images.
        """
        if self._train_split == self._test_split:
            raise UserError(
                f"dataset.train_split and dataset.test_split are both {self._test_split}: what is chosen on training "
                "images cannot be evaluated on the same ones. Set dataset.train_split to another split."
            )
        dataset: Dataset[Any] = self._dataset(
            self._train_source, self._eval_transform, self._train_labels, training=True
        )
        if isinstance(dataset, Images):
            spread = range(min(count, len(dataset)))
            dataset = Subset(dataset, [i * len(dataset) // len(spread) for i in spread])
        if isinstance(self._train_source, StreamSource):
            self._train_source.split_over(0)
        loader = self._loader(dataset, num_workers=0)
        images = [image for batch in islice(loader, -(-count // self._batch_size)) for image in batch["image"]]
        if not images:
            raise UserError(f"not one of {count} training images of {self.name} could be read.")
        return self.normalise(torch.stack(images[:count]))

    def _open(self, split: str, training: bool) -> ImageSource | StreamSource:
        if self._source not in ("imagefolder", "imagenette"):
            return open_timm(
                self._source, self._root, split, training=training, batch_size=self._batch_size, seed=self._seed
            )
        imagenette = self._source == "imagenette"
        root = find_imagenette(self._root, split) if imagenette else find_root(self.name, self._root)
        return FolderSource((training_directory if training else evaluation_directory)(root, split))

    @cached_property
    def _test_images(self) -> Images | ImageStream | CachedImages:
        images = self._dataset(self._test_source, self._eval_transform, self._test_labels)
        if self._cache is None or isinstance(images, ImageStream):
            return images
        return CachedImages(images, self._collate.input_size, self._cache, self.name, self._num_workers)

    @cached_property
    def _train_source(self) -> ImageSource | StreamSource:
        return self._open(self._train_split, training=True)

    @cached_property
    def _train_labels(self) -> list[int] | None:
        if self.num_classes is None:
            return None
        classes = name_classes(self._train_source.classes, self._classes)
        names_are_the_datasets = self.class_names is self._test_classes
        if names_are_the_datasets and set(classes or ()) != set(self._test_classes or ()):
            only_one = sorted(set(classes or ()) ^ set(self._test_classes or ()))
            raise UserError(
                f"{self._train_source.location} and {self._test_source.location} differ in the classes "
                f"{', '.join(only_one)}: give both the same class folders; an empty one will do."
            )
        return map_classes(classes, self.class_names, self.num_classes)

    def _training_indices(self, held_out: bool) -> list[int]:
        source = self._train_source
        assert not isinstance(source, StreamSource)
        return [i for i in range(len(source)) if is_held_out(source.holdout_key(i), self._holdout) == held_out]

    def _dataset(
        self,
        source: ImageSource | StreamSource,
        transform: Callable[[Image.Image], Tensor],
        label_map: Sequence[int] | None,
        training: bool = False,
    ) -> Images | ImageStream:
        prepare = Preparation(transform, label_map, self.num_classes, self._on_error)
        if isinstance(source, StreamSource):
            return ImageStream(source, prepare, complete=not training)
        return Images(source, prepare)

    def _loader(self, dataset: Dataset[Any], num_workers: int, **options: Any) -> ImageLoader:
        return ImageLoader(
            dataset,
            batch_size=self._batch_size,
            num_workers=num_workers,
            collate_fn=self._collate,
            pin_memory=torch.cuda.is_available(),
            **options,
        )


class EpochShuffle(Sampler[int]):
    """A random order that is a function of the seed and the epoch, so that a resumed run goes on in the same one.

    Lightning calls ``set_epoch``.
    """

    def __init__(self, length: int, seed: int) -> None:
        self._length, self._seed, self._epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        return iter(torch.randperm(self._length, generator=generator).tolist())


def is_held_out(key: str, share: float) -> bool:
    """The same answer for the same key on every machine, in every order and however many images there are."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _training_transform(data_config: Mapping[str, Any], options: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    known = inspect.signature(create_transform).parameters
    if not isinstance(options, Mapping):
        raise UserError(f"dataset.train_transform={options}: expected a mapping of {', '.join(known)}.")
    for option in options:
        if option not in known:
            raise unknown("dataset.train_transform option", option, known)
    return create_transform(**{**data_config, **options}, is_training=True)
