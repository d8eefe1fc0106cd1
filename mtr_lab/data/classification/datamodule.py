"""Image classification data for Lightning: training, held-out and evaluation images of one dataset."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from mtr_lab.data.batches import Collate, ImageLoader
from mtr_lab.data.cache import CachedImages
from mtr_lab.data.classes import map_classes, name_classes
from mtr_lab.data.classification.timm_sources import StreamSource, open_timm
from mtr_lab.data.folders import FolderSource, evaluation_directory, find_imagenette, find_root, training_directory
from mtr_lab.data.images import Images, ImageSource, ImageStream, Preparation
from mtr_lab.data.splits import SplitDataModule
from mtr_lab.errors import UserError, unknown


class ImageDataModule(SplitDataModule[Any]):
    """Images of ImageFolder directories or of anything timm opens, as batches that a classifier takes.

    Everything that can be wrong with the evaluation images, the class names and the options is found here, before a
    model exists; the training images are opened by ``setup("fit")`` or at first use. Batches are described at
    :class:`~mtr_lab.data.batches.Collate`; labels are the model's outputs. Evaluation images are preprocessed by
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

    _collate: Collate

    def __init__(
        self,
        *,
        data_config: Mapping[str, Any],
        root: str | None = None,
        source: str = "imagefolder",
        classes: str | Sequence[str] | None = None,
        batch_size: int = 50,
        cache: str | None = None,
        model_classes: Sequence[str] | None = None,
        num_classes: int | None = None,
        train_transform: Mapping[str, Any] | None = None,
        **split: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **split)
        if not isinstance(classes, str | Sequence | None):
            raise UserError(f"dataset.classes={classes}: expected a list of names, or imagenet-1k.")
        self._root = None if root is None else str(root)  # a directory may be called 5, which YAML takes for a number
        self._source = str(source)
        self._classes = classes
        self._collate = Collate(tuple(data_config["input_size"]))
        self._mean, self._std = data_config["mean"], data_config["std"]
        self._eval_transform = create_transform(**data_config, is_training=False, normalize=False)  # to uint8
        self._train_transform = _training_transform(data_config, {} if train_transform is None else train_transform)

        self._cache = None if cache is None else Path(str(cache)).expanduser()
        if self._cache is not None and isinstance(self._test_source, StreamSource):
            raise UserError(
                f"dataset.cache={cache}: the images of the stream {source} cannot be kept, as only their order tells "
                "them apart. Set dataset.cache=null, or choose a source with random access such as hfds/."
            )
        if self._holdout and isinstance(self._test_source, StreamSource):
            raise UserError(
                f"dataset.holdout={self._holdout}: nothing can be held out of the stream {source}, as its order "
                "changes. Set dataset.holdout=0, or choose a source with random access such as hfds/."
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

    def normalise(self, images: Tensor) -> Tensor:
        """What the model takes, (B, 3, H, W) float32, of uint8 evaluation images of that shape, on their device."""
        mean, std = (_channel_tensor(tuple(values), images.device) for values in (self._mean, self._std))
        return images.float().div_(255).sub_(mean).div_(std)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Lightning's hook: evaluation images are normalised on the device, in the trainer's precision."""
        if batch["image"].dtype == torch.uint8:
            assert self.trainer is not None
            batch["image"] = self.trainer.precision_plugin.convert_input(self.normalise(batch["image"]))
        return batch

    def train_dataloader(self) -> ImageLoader:
        """As that of :class:`SplitDataModule`; of a stream, which shuffles itself, nothing is held out."""
        if not isinstance(self._train_source, StreamSource):
            return super().train_dataloader()
        self._train_source.split_over(self._num_workers)
        dataset = self._training_images(augmented=True)
        return self._loader(dataset, drop_last=True, persistent_workers=self._num_workers > 0)

    def test_dataloader(self) -> ImageLoader:
        """The evaluation images, in the same order and batches every time.

        With a cache, the first call builds it.
        """
        if not isinstance(self._test_source, StreamSource):
            return super().test_dataloader()
        num_workers = min(self._num_workers, 1)
        self._test_source.split_over(num_workers)
        return self._loader(self._evaluation_images(), num_workers=num_workers)

    def calibration_images(self, count: int) -> Tensor:
        """As those of :class:`SplitDataModule`, normalised; of a stream the first."""
        return self.normalise(super().calibration_images(count))

    def _calibration_batches(self, count: int) -> Iterable[dict[str, Any]]:
        if not isinstance(self._train_source, StreamSource):
            return super()._calibration_batches(count)
        self._train_source.split_over(0)
        loader = self._loader(self._training_images(augmented=False), num_workers=0)
        return islice(loader, -(-count // self._batch_size))

    def _open(self, split: str, training: bool) -> ImageSource | StreamSource:
        if self._source not in ("imagefolder", "imagenette"):
            return open_timm(
                self._source, self._root, split, training=training, batch_size=self._batch_size, seed=self._seed
            )
        imagenette = self._source == "imagenette"
        root = find_imagenette(self._root, split) if imagenette else find_root(self.name, self._root)
        return FolderSource((training_directory if training else evaluation_directory)(root, split))

    def _holdout_key(self, index: int) -> str:
        return self._train_source.holdout_key(index)

    def _training_images(self, augmented: bool) -> Images | ImageStream:
        transform = self._train_transform if augmented else self._eval_transform
        return self._dataset(self._train_source, transform, self._train_labels, training=True)

    def _evaluation_images(self) -> Images | ImageStream | CachedImages:
        return self._test_images

    @cached_property
    def _test_images(self) -> Images | ImageStream | CachedImages:
        images = self._dataset(self._test_source, self._eval_transform, self._test_labels)
        if self._cache is None or isinstance(images, ImageStream):
            return images
        return CachedImages(images, self._collate.input_size, self._cache, self.name, self._num_workers)

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


@cache
def _channel_tensor(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(3, 1, 1), once for all batches: the copy waits for all that the device has to do."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def _training_transform(data_config: Mapping[str, Any], options: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    known = inspect.signature(create_transform).parameters
    if not isinstance(options, Mapping):
        raise UserError(f"dataset.train_transform={options}: expected a mapping of {', '.join(known)}.")
    for option in options:
        if option not in known:
            raise unknown("dataset.train_transform option", option, known)
    return create_transform(**{**data_config, **options}, is_training=True)
