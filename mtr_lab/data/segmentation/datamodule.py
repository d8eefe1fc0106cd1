"""Segmentation data for Lightning: training, held-out and evaluation images with their label maps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

from mtr_lab.data.annotated import AnnotatedImages, Reading
from mtr_lab.data.batches import EntryCollate
from mtr_lab.data.classes import map_classes
from mtr_lab.data.folders import find_root
from mtr_lab.data.orientation import Orientation, turned
from mtr_lab.data.random_crop import check_train_transform
from mtr_lab.data.segmentation.label_maps import IGNORE, LabelMapSource
from mtr_lab.data.segmentation.transforms import RandomCrop, Windows
from mtr_lab.data.splits import SplitDataModule, subsample
from mtr_lab.errors import UserError, check_number, unknown

MAX_COUNTED = 500
"""Largest number of training images whose pixels ``class_pixels`` counts."""


class SegmentationDataModule(SplitDataModule[LabelMapSource]):
    """Images with label maps for semantic segmentation.

    For evaluation, an image is cut into windows of the model's input size. With ``"whole"`` inference it is one window:
    the image is scaled to fit, placed at the top left, and padded with the mean colour. With ``"slide"`` the image is
    scaled to cover the window, which slides along the longer side; neighbours overlap by a third.

    A batch of B images is a dictionary of

    * ``image``: N windows (N, 3, H, W) float32, normalised; for training (B, 3, H, W);
    * ``windows``: for each image, the (top, left) of its windows; None for training;
    * ``size``: B pairs (height, width) of the scaled image; None for training;
    * ``label``: B maps (height, width) uint8 of the original size; for training (B, H, W) int64. Classes count from 0,
      and 255 is ignored;
    * ``id``, ``hash``, ``skipped``: see :class:`~mtr_lab.data.batches.EntryCollate`.

    Args:
        data_config: timm's ``input_size`` (3, H, W), ``mean``, ``std``.
        root: the dataset's directory; ``pkg://package/path`` is a directory in an installed package.
        layout: ``"camvid"``, ``"ade20k"`` or ``"voc"``, see ``LAYOUTS``.
        classes: names in label order, or the number of classes.
        inference: ``"whole"`` or ``"slide"``.
        model_classes, num_classes: classes of a model that has weights; by default those of the dataset.
        train_transform: ``scale`` and ``color_jitter`` of :class:`RandomCrop`.
        split: the options of :class:`~mtr_lab.data.splits.SplitDataModule`.

    Attributes:
        class_names, num_classes: classes of the labels in the batches.
        num_images: number of evaluation images.

    Raises:
        UserError: an option is invalid, or does not fit the images.
    """

    def __init__(
        self,
        *,
        data_config: Mapping[str, Any],
        root: str | None,
        layout: str,
        classes: int | Sequence[str],
        inference: str = "whole",
        model_classes: Sequence[str] | None = None,
        num_classes: int | None = None,
        train_transform: Mapping[str, Any],
        **split: Any,
    ) -> None:
        super().__init__(**split)
        if inference not in ("whole", "slide"):
            raise unknown("dataset.inference", inference, ["whole", "slide"])
        self._root = find_root(self.name, None if root is None else str(root), of_classes=False)
        self._layout, self._classes = str(layout), _class_names(classes)
        self._windows = Windows(tuple(data_config["input_size"][1:]), slide=inference == "slide")
        self._collate = SegmentationCollate(self._windows.size)
        self._normalise = data_config["mean"], data_config["std"]
        self._augmentation = _augmentation(self._windows.size, train_transform)
        self.class_names: Sequence[str] = model_classes or self._classes
        self.num_classes = num_classes or len(self.class_names)
        self._label_map = map_classes(self._classes, model_classes, self.num_classes)
        self.num_images = len(self._test_source)

    def class_pixels(self) -> Tensor:
        """Number of pixels of each class (K,), counted in at most ``MAX_COUNTED`` training images."""
        source = self._train_source
        counts = np.zeros(IGNORE + 1, np.int64)
        for index in subsample(len(source), MAX_COUNTED):
            counts += np.bincount(self._mapped(source.labels(index)).flatten(), minlength=IGNORE + 1)
        return torch.from_numpy(counts[: self.num_classes])

    def _open(self, split: str, training: bool) -> LabelMapSource:
        source = LabelMapSource(self._root, split, self._layout, self._classes, self._on_error)
        source.left_out.report(source.location)
        return source

    def _training_images(self, augmented: bool) -> "SegmentationImages":
        return self._images(self._train_source, self._augmentation if augmented else None)

    def _evaluation_images(self) -> "SegmentationImages":
        return self._images(self._test_source, None)

    def _images(self, source: LabelMapSource, augmentation: RandomCrop | None) -> "SegmentationImages":
        return SegmentationImages(
            source,
            self._mapped,
            self._windows,
            augmentation,
            self._normalise,
            reading=Reading(self._on_error, self._exif, self._remarks),
        )

    def _mapped(self, labels: np.ndarray) -> np.ndarray:
        if self._label_map is None:
            return labels
        table = np.full(IGNORE + 1, IGNORE, np.uint8)
        table[: len(self._label_map)] = self._label_map
        return table[labels]


class SegmentationImages(AnnotatedImages[LabelMapSource]):
    """Entries of ``SegmentationDataModule``'s batches, augmented if there is an ``augmentation``."""

    def __init__(
        self,
        source: LabelMapSource,
        mapped: Callable[[np.ndarray], np.ndarray],
        windows: Windows,
        augmentation: RandomCrop | None,
        normalise: tuple[Sequence[float], Sequence[float]],
        *,
        reading: Reading,
    ) -> None:
        super().__init__(source, normalise, reading)
        self.mapped, self.windows, self.augmentation = mapped, windows, augmentation

    def annotated(self, index: int, image: Tensor, orientation: Orientation) -> dict[str, Any]:
        stored = self.source.labels(index)
        name = f"the label map of image {self.source.id(index)} of {self.source.location}"
        turn = orientation.turn(stored.shape, (image.shape[-2], image.shape[-1]), name)
        labels = torch.from_numpy(turned(self.mapped(stored), turn))
        if self.augmentation is not None:
            image, labels, padding = self.augmentation(image, labels)
            image, labels = F.pad(self.normalised(image), padding), F.pad(labels[None], padding, fill=IGNORE)[0]
            return {"image": image[None], "label": labels.long()}
        windows, offsets, size = self.windows(self.normalised(image))
        return {"image": windows, "windows": offsets, "size": size, "label": labels}


class SegmentationCollate(EntryCollate):
    """Batches as described at ``SegmentationDataModule``; ``size`` (H, W) is the shape of a batch without images."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def stack(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        training = bool(entries) and "windows" not in entries[0]
        images, labels = ([entry[key] for entry in entries] for key in ("image", "label"))
        return {
            "image": torch.cat(images) if images else torch.empty(0, 3, *self.size),
            "label": torch.stack(labels) if training else labels,
            **{key: [entry.get(key) for entry in entries] for key in ("windows", "size")},
        }


def _class_names(classes: int | Sequence[str]) -> tuple[str, ...]:
    if isinstance(classes, int):
        check_number("dataset.classes", classes, int, 2, IGNORE)
        return tuple(map(str, range(classes)))
    if not isinstance(classes, Sequence) or isinstance(classes, str) or not 2 <= len(classes) <= IGNORE:
        raise UserError(f"dataset.classes={classes}: expected 2 to {IGNORE} names, or the number of classes.")
    return tuple(map(str, classes))


def _augmentation(size: tuple[int, int], options: Mapping[str, Any]) -> RandomCrop:
    check_train_transform(options)
    low, high = options["scale"]
    return RandomCrop(size, (low, high), options["color_jitter"])
