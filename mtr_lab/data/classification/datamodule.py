"""Image classification data for Lightning: training, held-out and evaluation images of one dataset."""

import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from mtr_lab.data.batches import Collate, ImageLoader
from mtr_lab.data.classes import map_classes, name_classes
from mtr_lab.data.classification.augmentation import Augmentation
from mtr_lab.data.classification.cache import CachedImages
from mtr_lab.data.classification.device_images import DeviceImages, DeviceLoader
from mtr_lab.data.classification.images import Images, ImageSource, ImageStream, Preparation
from mtr_lab.data.classification.rand_augment import RandAugment, channel_tensor
from mtr_lab.data.classification.timm_sources import StreamSource, open_timm
from mtr_lab.data.folders import FolderSource, evaluation_directory, find_imagenette, find_root, training_directory
from mtr_lab.data.splits import SplitDataModule
from mtr_lab.errors import UserError, unknown


class ImageDataModule(SplitDataModule[Any]):
    """Classification images from class folders or any dataset that timm opens.

    The constructor checks the options, the class names and the evaluation images; ``setup("fit")`` or the first use
    checks the training images. For batches see :class:`~mtr_lab.data.batches.Collate`; labels are indices of the
    model's outputs. Evaluation images are resized to size / crop_pct and cropped at the centre by
    ``timm.data.create_transform(**data_config)``. They stay uint8, a byte per value, until ``normalise`` converts them
    on the device; a Lightning trainer calls it through a hook.

    Args:
        data_config: timm's ``input_size`` (3, H, W), ``interpolation``, ``mean``, ``std``, ``crop_pct``.
        root: directory with class folders in ``train/`` and ``val/`` or, for evaluation only, directly in it;
            ``pkg://package/path`` is a directory in an installed package. timm's sources receive it unchanged.
        source: ``"imagefolder"``; ``"imagenette"``, which is downloaded if missing; or a timm dataset name such as
            ``"hfds/ILSVRC/imagenet-1k"`` or ``"wds/imagenet"``.
        classes: names of labels 0, 1, 2 … if the dataset does not name them, or ``"imagenet-1k"``.
        image_column, label_column: of a Hugging Face dataset or a WebDataset, see
            :func:`~mtr_lab.data.classification.timm_sources.open_timm`.
        include, exclude: text files with one image per line, its path below ``test_split``: evaluate only these images,
            or all but these. For class folders.
        batch_size: number of images in a batch.
        cache: directory for decoded evaluation images, see :class:`~mtr_lab.data.classification.cache.CachedImages`.
        train_cache: ``"device"`` decodes the training images once a run and keeps them on the device, which augments
            them, see :class:`~mtr_lab.data.classification.device_images.DeviceImages`.
        model_classes: class names in the order of the model's outputs, if known.
        num_classes: number of the model's outputs; ``None``: the dataset's number of classes.
        train_transform: options of ``timm.data.create_transform`` for training (``scale``, ``auto_augment``, …).
        split: the other options of :class:`~mtr_lab.data.splits.SplitDataModule`. ``train_split`` and ``test_split``
            are directories below ``root`` or splits of the source. For evaluation a stream uses at most one worker,
            as more workers would change its order.

    Attributes:
        class_names: names of the labels in the batches, if known.
        num_classes: number of different labels; ``None`` if neither model nor dataset tells.
        num_images: number of evaluation images; ``None`` if the source does not tell.

    Raises:
        UserError: an option is invalid, or does not fit the images.
    """

    _collate: Collate

    def __init__(
        self,
        *,
        data_config: Mapping[str, Any],
        root: str | None = None,
        source: str = "imagefolder",
        classes: str | Sequence[str] | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        include: str | None = None,
        exclude: str | None = None,
        batch_size: int = 50,
        cache: str | None = None,
        train_cache: str | None = None,
        model_classes: Sequence[str] | None = None,
        num_classes: int | None = None,
        train_transform: Mapping[str, Any] | None = None,
        **split: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **split)
        if not isinstance(classes, str | Sequence | None):
            raise UserError(f"dataset.classes={classes}: expected a list of names, or imagenet-1k.")
        self._root = None if root is None else str(root)  # YAML reads a directory called 5 as a number
        self._source = str(source)
        self._include = None if include is None else Path(os.path.expanduser(str(include)))
        self._exclude = None if exclude is None else Path(os.path.expanduser(str(exclude)))
        self._classes = classes
        self._columns = {"image_column": image_column, "label_column": label_column}
        self._collate = Collate(tuple(data_config["input_size"]))
        self._mean, self._std = data_config["mean"], data_config["std"]
        self._eval_transform = create_transform(**data_config, is_training=False, normalize=False)  # to uint8
        self._train_transform = _training_transform(data_config, {} if train_transform is None else train_transform)

        self._cache = None if cache is None else Path(os.path.expanduser(str(cache)))
        if self._cache is not None and isinstance(self._test_source, StreamSource):
            raise UserError(
                f"dataset.cache={cache}: the images of the stream {source} cannot be cached, as they have no ids. "
                "Set dataset.cache=null, or choose a source with random access such as hfds/."
            )
        if self._holdout and isinstance(self._test_source, StreamSource):
            raise UserError(
                f"dataset.holdout={self._holdout}: nothing can be held out of the stream {source}, as its order "
                "changes. Set dataset.holdout=0, or choose a source with random access such as hfds/."
            )
        self._augmentation: Augmentation | None = None
        if train_cache is not None:
            if train_cache != "device":
                raise unknown("dataset.train_cache", train_cache, ["device", "null"])
            self._augmentation = _device_augmentation(data_config, train_transform or {})
            if isinstance(self._test_source, StreamSource):
                raise UserError(
                    f"dataset.train_cache=device: the stream {source} cannot be kept on a device. Set it to null."
                )
        height, width = (math.floor(side / data_config["crop_pct"]) for side in data_config["input_size"][1:])
        self._kept_size = (height, width)  # of a training image on the device
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
        """Evaluation images (B, 3, H, W), uint8 -> float32, normalised as the model expects, on their device."""
        mean, std = (channel_tensor(tuple(values), images.device) for values in (self._mean, self._std))
        return images.float().div_(255).sub_(mean).div_(std)

    def _standardise(self, images: Tensor) -> Tensor:
        """The same of images from 0 to 1."""
        mean, std = (channel_tensor(tuple(values), images.device) for values in (self._mean, self._std))
        return (images - mean) / std

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Lightning's hook: normalise evaluation images on the device, in the trainer's precision."""
        if batch["image"].dtype == torch.uint8:
            assert self.trainer is not None
            batch["image"] = self.trainer.precision_plugin.convert_input(self.normalise(batch["image"]))
        return batch

    def setup(self, stage: str) -> None:
        super().setup(stage)
        several = self.trainer is not None and self.trainer.world_size > 1
        if stage == "fit" and several and isinstance(self._train_source, StreamSource):
            raise UserError(
                f"dataset.source={self._source} is a stream, which only one device can train on: set trainer=default, "
                "or choose a source with random access such as hfds/."
            )

    def train_dataloader(self) -> ImageLoader | DeviceLoader:  # type: ignore[override]
        """As in :class:`SplitDataModule`; a stream shuffles itself and holds nothing out.

        A resumed run reads a stream from its start: it is not the uninterrupted run bit for bit.
        """
        if not isinstance(self._train_source, StreamSource):
            return super().train_dataloader() if self._augmentation is None else self._device_loader(self._augmentation)
        self._train_source.split_over(self._num_workers)
        dataset = self._training_images(augmented=True)
        return self._loader(dataset, drop_last=True, persistent_workers=self._num_workers > 0)

    def _device_loader(self, augmentation: Augmentation) -> DeviceLoader:
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        images: Any = self._training_images(augmented=False)
        kept = DeviceImages(
            images,
            self._training_indices(held_out=False),
            self._kept_size,
            device,
            self._num_workers,
            self.name,
            progress=self.trainer is None or self.trainer.is_global_zero,
        )
        sampler = self._training_sampler(range(len(kept)))
        return DeviceLoader(kept, augmentation, self._standardise, sampler, self._seed)

    def test_dataloader(self) -> ImageLoader:
        """The evaluation images, in the same order and batches every time.

        The first call builds the cache, if there is to be one.
        """
        if not isinstance(self._test_source, StreamSource):
            return super().test_dataloader()
        num_workers = min(self._num_workers, 1)
        self._test_source.split_over(num_workers)
        return self._loader(self._evaluation_images(), num_workers=num_workers)

    def calibration_images(self, count: int) -> Tensor:
        """As in :class:`SplitDataModule`, normalised; from a stream, the first images."""
        return self.normalise(super().calibration_images(count))

    def _calibration_batches(self, count: int) -> Iterable[dict[str, Any]]:
        if not isinstance(self._train_source, StreamSource):
            return super()._calibration_batches(count)
        self._train_source.split_over(0)
        loader = self._loader(self._training_images(augmented=False), num_workers=0)
        return islice(loader, -(-count // self._batch_size))

    def _open(self, split: str, training: bool) -> ImageSource | StreamSource:
        if self._source not in ("imagefolder", "imagenette"):
            if self._include is not None or self._exclude is not None:
                raise UserError(
                    f"dataset.include and dataset.exclude list files of class folders, and dataset.source="
                    f"{self._source} has other images: set both to null."
                )
            return open_timm(
                self._source,
                self._root,
                split,
                training=training,
                batch_size=self._batch_size,
                seed=self._seed,
                **self._columns,
            )
        if any(self._columns.values()):
            raise UserError(
                f"dataset.source={self._source} has no columns: set dataset.image_column and label_column to null."
            )
        imagenette = self._source == "imagenette"
        root = find_imagenette(self._root, split) if imagenette else find_root(self.name, self._root)
        if training:
            source = FolderSource(training_directory(root, split), on_error=self._on_error)
        else:
            directory = evaluation_directory(root, split)
            source = FolderSource(directory, self._include, self._exclude, self._on_error)
        source.left_out.report(source.location)
        return source

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
                f"{', '.join(only_one)}: give both the same class folders; they may be empty."
            )
        return map_classes(classes, self.class_names, self.num_classes)

    def _dataset(
        self,
        source: ImageSource | StreamSource,
        transform: Callable[[Image.Image], Tensor],
        label_map: Sequence[int] | None,
        training: bool = False,
    ) -> Images | ImageStream:
        prepare = Preparation(transform, label_map, self.num_classes, self._on_error, self._exif, self._remarks)
        if isinstance(source, StreamSource):
            return ImageStream(source, prepare, complete=not training)
        return Images(source, prepare)


def _device_augmentation(data_config: Mapping[str, Any], options: Mapping[str, Any]) -> Augmentation:
    """What of timm's options a device does; the others have to be off."""
    known = {field.name for field in fields(Augmentation)} - {"size"}
    given = {"interpolation": data_config["interpolation"], **options}
    for option, value in given.items():
        if option not in known and value:
            raise UserError(
                f"dataset.train_cache=device does without dataset.train_transform.{option}={value}: set that to null, "
                f"or train_cache. On the device there are {', '.join(sorted(known))}."
            )
    chosen: dict[str, Any] = {option: given[option] for option in known & given.keys() if given[option] is not None}
    if chosen["interpolation"] not in ("bilinear", "bicubic"):
        raise UserError(
            f"dataset.train_cache=device resizes by bilinear or bicubic interpolation, not {chosen['interpolation']}: "
            "set dataset.train_transform.interpolation, or train_cache to null."
        )
    if "auto_augment" in chosen:
        chosen["auto_augment"] = RandAugment.from_text(chosen["auto_augment"], data_config["mean"])
    jitter = chosen.get("color_jitter") or 0.0
    if not isinstance(jitter, int | float):
        raise UserError(
            f"dataset.train_cache=device takes one number for dataset.train_transform.color_jitter, not {jitter}."
        )
    height, width = data_config["input_size"][1:]
    return Augmentation(size=(height, width), **{**chosen, "color_jitter": jitter})


def _training_transform(data_config: Mapping[str, Any], options: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    known = inspect.signature(create_transform).parameters
    if not isinstance(options, Mapping):
        raise UserError(f"dataset.train_transform={options}: expected a mapping of {', '.join(known)}.")
    for option in options:
        if option not in known:
            raise unknown("dataset.train_transform option", option, known)
    return create_transform(**{**data_config, **options}, is_training=True)
