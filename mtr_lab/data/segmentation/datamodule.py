"""Segmentation data for Lightning: training, held-out and evaluation images with their label maps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

from mtr_lab.data.annotated import AnnotatedImages
from mtr_lab.data.batches import EntryCollate
from mtr_lab.data.classes import map_classes
from mtr_lab.data.folders import find_root
from mtr_lab.data.random_crop import check_train_transform
from mtr_lab.data.segmentation.label_maps import IGNORE, LabelMapSource
from mtr_lab.data.segmentation.transforms import RandomCrop, Windows
from mtr_lab.data.splits import SplitDataModule, subsample
from mtr_lab.errors import UserError, check_number, unknown

MAX_COUNTED = 500
"""Of how many training images at most the pixels of each class are counted."""


class SegmentationDataModule(SplitDataModule[LabelMapSource]):
    """Images with label maps, as batches that a segmenter takes.

    For evaluation an image is one or several windows of the model's input size. ``"whole"``: one, which the image fills
    as far as its shape allows, from the top left; the rest is of the mean colour. ``"slide"``: the image is scaled so
    that it just covers a window, and windows that overlap by a third follow each other along its longer side.

    A batch of B images is {"image": (N, 3, H, W), N windows, "windows": of each image the (top, left) of its windows,
    "size": B (height, width) of the scaled image, "label": B maps (height, width) uint8 of the original image, "id",
    "hash", "skipped"}; while training "image" (B, 3, H, W) and "label" (B, H, W) int64. Labels are from 0, or 255 to
    ignore.

    Args:
        name: what the dataset is called in results and messages.
        data_config: timm's ``input_size`` (3, H, W), ``mean``, ``std``.
        root: the directory; ``pkg://package/path`` inside an installed package.
        layout: ``"camvid"``, ``"ade20k"`` or ``"voc"``, see ``LAYOUTS``.
        classes: names in the order of the labels, or only how many there are.
        train_split, test_split: names of splits.
        inference: ``"whole"`` or ``"slide"``.
        holdout: share of the training images kept for validation while training, chosen by a hash of their names.
        batch_size, num_workers, on_error: as those of :class:`SplitDataModule`.
        model_classes, num_classes: of the model's outputs, if it has weights already.
        train_transform: ``scale``, least and largest factor to the scale at which the whole image fits, and
            ``color_jitter``, by how much brightness, contrast and saturation change.
        seed: fixes the order of the training images.

    Attributes:
        class_names, num_classes: of the labels in the batches.
        num_images: how many evaluation images there are.

    Raises:
        UserError: anything above is not as expected.
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
        """How many pixels of each class (K,) the training images have, counted in ``MAX_COUNTED`` of them at most."""
        source = self._train_source
        counts = np.zeros(IGNORE + 1, np.int64)
        for index in subsample(len(source), MAX_COUNTED):
            counts += np.bincount(self._mapped(source.labels(index)).flatten(), minlength=IGNORE + 1)
        return torch.from_numpy(counts[: self.num_classes])

    def _open(self, split: str, training: bool) -> LabelMapSource:
        return LabelMapSource(self._root, split, self._layout, self._classes)

    def _training_images(self, augmented: bool) -> "SegmentationImages":
        return self._images(self._train_source, self._augmentation if augmented else None)

    def _evaluation_images(self) -> "SegmentationImages":
        return self._images(self._test_source, None)

    def _images(self, source: LabelMapSource, augmentation: RandomCrop | None) -> "SegmentationImages":
        return SegmentationImages(
            source, self._mapped, self._windows, augmentation, self._normalise, on_error=self._on_error
        )

    def _mapped(self, labels: np.ndarray) -> np.ndarray:
        if self._label_map is None:
            return labels
        table = np.full(IGNORE + 1, IGNORE, np.uint8)
        table[: len(self._label_map)] = self._label_map
        return table[labels]


class SegmentationImages(AnnotatedImages[LabelMapSource]):
    """Entries of a batch as ``SegmentationDataModule`` describes it, augmented ones for training or original ones."""

    def __init__(
        self,
        source: LabelMapSource,
        mapped: Callable[[np.ndarray], np.ndarray],
        windows: Windows,
        augmentation: RandomCrop | None,
        normalise: tuple[Sequence[float], Sequence[float]],
        *,
        on_error: str,
    ) -> None:
        super().__init__(source, normalise, on_error)
        self.mapped, self.windows, self.augmentation = mapped, windows, augmentation

    def annotated(self, index: int, image: Tensor) -> dict[str, Any]:
        labels = torch.from_numpy(self.mapped(self.source.labels(index)))
        if labels.shape != image.shape[-2:]:
            raise UserError(
                f"image {self.source.id(index)} of {self.source.location} has {image.shape[-1]} x {image.shape[-2]} "
                f"pixels, its label map {labels.shape[1]} x {labels.shape[0]}: expected the same. Resize one of them."
            )
        if self.augmentation is not None:
            image, labels, missing = self.augmentation(image, labels)
            image, labels = F.pad(self.normalised(image), missing), F.pad(labels[None], missing, fill=IGNORE)[0]
            return {"image": image[None], "label": labels.long()}
        windows, offsets, size = self.windows(self.normalised(image))
        return {"image": windows, "windows": offsets, "size": size, "label": labels}


class SegmentationCollate(EntryCollate):
    """Batches as ``SegmentationDataModule`` describes them.

    ``size`` (H, W) shapes one none of whose images could be decoded.
    """

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
        raise UserError(f"dataset.classes={classes}: expected 2 to {IGNORE} names, or how many classes there are.")
    return tuple(map(str, classes))


def _augmentation(size: tuple[int, int], options: Mapping[str, Any]) -> RandomCrop:
    check_train_transform(options)
    low, high = options["scale"]
    return RandomCrop(size, (low, high), options["color_jitter"])
