"""Segmentation data for Lightning: training, held-out and evaluation images with their label maps."""

import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.transforms import v2

from mtr_lab.data.classes import map_classes
from mtr_lab.data.datamodule import EpochShuffle, is_held_out
from mtr_lab.data.folders import find_root
from mtr_lab.data.images import Entry, ImageLoader, Skipped, decode, reason, undecodable
from mtr_lab.data.label_maps import IGNORE, LabelMapSource
from mtr_lab.errors import UserError, check_number, unknown

COUNTED = 500
"""Of how many training images at most the pixels of each class are counted."""
OVERLAP = 1 / 3
"""The share of a sliding window that the next one covers again."""


class SegmentationDataModule(LightningDataModule):
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
        batch_size, num_workers, on_error: as those of ``ImageDataModule``.
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
        name: str,
        data_config: Mapping[str, Any],
        root: str | None,
        layout: str,
        classes: int | Sequence[str],
        train_split: str = "train",
        test_split: str = "val",
        inference: str = "whole",
        holdout: float = 0.0,
        batch_size: int = 16,
        num_workers: int = 0,
        on_error: str = "fail",
        model_classes: Sequence[str] | None = None,
        num_classes: int | None = None,
        train_transform: Mapping[str, Any],
        seed: int = 0,
    ) -> None:
        super().__init__()
        if inference not in ("whole", "slide"):
            raise unknown("dataset.inference", inference, ["whole", "slide"])
        if on_error not in ("fail", "skip"):
            raise unknown("dataset.on_error", on_error, ["fail", "skip"])
        check_number("dataset.holdout", holdout, float, 0, 0.99)
        check_number("dataset.batch_size", batch_size, int, 1)
        check_number("dataset.num_workers", num_workers, int, 0)
        self.name = str(name)
        self._root = find_root(self.name, None if root is None else str(root))
        self._layout, self._classes = str(layout), _class_names(classes)
        self._train_split, self._test_split = str(train_split), str(test_split)
        self._holdout, self._on_error, self._seed = holdout, on_error, seed
        self._batch_size, self._num_workers = batch_size, min(num_workers, os.cpu_count() or 1)
        self._windows = Windows(tuple(data_config["input_size"][1:]), slide=inference == "slide")
        self._normalise = list(data_config["mean"]), list(data_config["std"])
        self._augmentation = _augmentation(self._windows.size, train_transform)
        self._test_source = self._source(self._test_split)
        self.class_names: Sequence[str] = model_classes or self._classes
        self.num_classes = num_classes or len(self.class_names)
        self._label_map = map_classes(self._classes, model_classes, self.num_classes)
        self.num_images = len(self._test_source)

    def identity(self) -> str:
        """A hash of the evaluation images and their labels that is cheap to have and changes when they do."""
        return self._test_source.identity()

    def setup(self, stage: str) -> None:
        """Open the training images if ``stage`` is ``"fit"``, so that what is wrong with them shows at once."""
        if stage == "fit":
            _ = self._train_source

    def class_pixels(self) -> Tensor:
        """How many pixels of each class (K,) the training images have, counted in ``COUNTED`` of them at most."""
        source = self._train_source
        some = min(COUNTED, len(source))
        counts = np.zeros(IGNORE + 1, np.int64)
        for index in (i * len(source) // some for i in range(some)):
            counts += np.bincount(self._mapped(source.labels(index)).flatten(), minlength=IGNORE + 1)
        return torch.from_numpy(counts[: self.num_classes])

    def train_dataloader(self) -> ImageLoader:
        """The training images that are not held out, shuffled and augmented, in full batches."""
        kept = self._training_indices(held_out=False)
        if len(kept) < self._batch_size:
            raise UserError(
                f"dataset.batch_size={self._batch_size} is more than the {len(kept)} training images: lower it."
            )
        dataset = self._dataset(self._train_source, self._augmentation)
        generator = torch.Generator().manual_seed(self._seed)  # of the workers' seeds
        options: dict[str, Any] = {"persistent_workers": self._num_workers > 0, "generator": generator}
        return self._loader(
            Subset(dataset, kept), drop_last=True, sampler=EpochShuffle(len(kept), self._seed), **options
        )

    def val_dataloader(self) -> ImageLoader | list[ImageLoader]:
        """The held-out training images, as for evaluation; no loader where nothing is held out."""
        if not self._holdout:
            return []
        held_out = self._training_indices(held_out=True)
        if not held_out:
            raise UserError(f"dataset.holdout={self._holdout} holds out none of the training images: choose more.")
        dataset = self._dataset(self._train_source)
        return self._loader(Subset(dataset, held_out), persistent_workers=self._num_workers > 0)

    def test_dataloader(self) -> ImageLoader:
        """The evaluation images, in the same order and batches every time."""
        return self._loader(self._dataset(self._test_source))

    def probe_images(self, count: int) -> Tensor:
        """Windows of training images, spread evenly over the split: (count, 3, H, W), or as many as there are.

        Raises:
            UserError: there are no training images, or they are the evaluation images.
        """
        if self._train_split == self._test_split:
            raise UserError(
                f"dataset.train_split and dataset.test_split are both {self._test_split}: what is chosen on training "
                "images cannot be evaluated on the same ones. Set dataset.train_split to another split."
            )
        dataset = self._dataset(self._train_source)
        some = min(count, len(dataset))
        loader = self._loader(Subset(dataset, [i * len(dataset) // some for i in range(some)]))
        images = torch.cat([batch["image"] for batch in loader])[:count]
        if not len(images):
            raise UserError(f"not one of {some} training images of {self.name} could be read.")
        return images

    def _source(self, split: str) -> LabelMapSource:
        return LabelMapSource(self._root, split, self._layout, self._classes)

    @cached_property
    def _train_source(self) -> LabelMapSource:
        return self._source(self._train_split)

    def _training_indices(self, held_out: bool) -> list[int]:
        source = self._train_source
        return [i for i in range(len(source)) if is_held_out(source.id(i), self._holdout) == held_out]

    def _mapped(self, labels: np.ndarray) -> np.ndarray:
        if self._label_map is None:
            return labels
        table = np.full(IGNORE + 1, IGNORE, np.uint8)
        table[: len(self._label_map)] = self._label_map
        return table[labels]

    def _dataset(self, source: LabelMapSource, augmentation: "RandomWindow | None" = None) -> "SegmentationImages":
        return SegmentationImages(
            source, self._mapped, self._windows, augmentation, self._normalise, on_error=self._on_error
        )

    def _loader(self, dataset: Dataset[Entry], **options: Any) -> ImageLoader:
        return ImageLoader(
            dataset,
            batch_size=self._batch_size,
            num_workers=self._num_workers,
            collate_fn=SegmentationCollate(self._windows.size),
            pin_memory=torch.cuda.is_available(),
            **options,
        )


class Windows:
    """How an image (3, h, w) becomes windows of ``size`` (H, W), see :class:`SegmentationDataModule`."""

    def __init__(self, size: tuple[int, int], slide: bool) -> None:
        self.size, self.slide = size, slide

    def __call__(self, image: Tensor) -> tuple[Tensor, list[tuple[int, int]], tuple[int, int]]:
        """Windows (n, 3, H, W) of a normalised image, their (top, left), (height, width) of the scaled image."""
        scales = [have / want for have, want in zip(self.size, image.shape[-2:], strict=True)]
        scale = max(scales) if self.slide else min(scales)
        rows, columns = (max(round(side * scale), 1) for side in image.shape[-2:])
        height, width = self.size
        scaled = F.resize(image, [rows, columns], antialias=True)
        padded = F.pad(scaled, [0, 0, max(width - columns, 0), max(height - rows, 0)])
        places = [(top, left) for top in _starts(rows, height) for left in _starts(columns, width)]
        windows = [padded[:, top : top + height, left : left + width] for top, left in places]
        return torch.stack(windows), places, (rows, columns)


def _starts(length: int, window: int) -> list[int]:
    """Where windows begin that cover ``length`` pixels."""
    count = math.ceil(max(length - window, 0) / (window * (1 - OVERLAP))) + 1
    return [round(i * max(length - window, 0) / max(count - 1, 1)) for i in range(count)]


class RandomWindow:
    """A random scale and place, mirror image and colours of an image with its label map, for training."""

    def __init__(self, size: tuple[int, int], scale: tuple[float, float], color_jitter: float) -> None:
        self.size, self.scale = size, scale
        self.colours = v2.ColorJitter(color_jitter, color_jitter, color_jitter)

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Image (3, h, w) uint8 and labels (h, w) uint8 to those of the part, and how far it has to be padded."""
        low, high = map(math.log, self.scale)
        fitting = min(have / want for have, want in zip(self.size, image.shape[-2:], strict=True))
        scale = fitting * math.exp(low + (high - low) * torch.rand(()).item())
        sides = [min(side, round(have / scale)) for side, have in zip(image.shape[-2:], self.size, strict=True)]
        corner = [int(torch.randint(side - part + 1, ())) for side, part in zip(image.shape[-2:], sides, strict=True)]
        place = (corner[0], corner[1], sides[0], sides[1])
        size = [min(max(round(side * scale), 1), most) for side, most in zip(sides, self.size, strict=True)]
        image = self.colours(F.resize(F.crop(image, *place), size, antialias=True))
        labels = F.resize(F.crop(labels[None], *place), size, F.InterpolationMode.NEAREST_EXACT)[0]
        if torch.rand(()) < 0.5:
            image, labels = image.flip(-1), labels.flip(-1)
        return image, labels, [0, 0, self.size[1] - size[1], self.size[0] - size[0]]


class SegmentationImages(Dataset[Entry]):
    """Entries of a batch as ``SegmentationDataModule`` describes it, augmented ones for training or original ones."""

    def __init__(
        self,
        source: LabelMapSource,
        mapped: Any,
        windows: Windows,
        augmentation: RandomWindow | None,
        normalise: tuple[list[float], list[float]],
        *,
        on_error: str,
    ) -> None:
        self.source, self.mapped, self.windows = source, mapped, windows
        self.augmentation, self.normalise, self.on_error = augmentation, normalise, on_error

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Entry:
        id = self.source.id(index)
        try:
            decoded, hash = decode(self.source.path(index).read_bytes())
        except Exception as error:  # damaged bytes make Pillow raise anything from OSError to struct.error
            return undecodable(id, self.source.location, reason(error), self.on_error)
        image = F.pil_to_tensor(decoded)
        try:
            labels = torch.from_numpy(self.mapped(self.source.labels(index)))
        except UserError as error:
            return error
        if labels.shape != image.shape[-2:]:
            return UserError(
                f"image {id} of {self.source.location} has {image.shape[-1]} x {image.shape[-2]} pixels, its label map "
                f"{labels.shape[1]} x {labels.shape[0]}: expected the same. Resize one of them."
            )
        if self.augmentation is not None:
            image, labels, missing = self.augmentation(image, labels)
            image, labels = F.pad(self._normalised(image), missing), F.pad(labels[None], missing, fill=IGNORE)[0]
            return {"image": image[None], "label": labels.long(), "id": id, "hash": hash}
        windows, places, size = self.windows(self._normalised(image))
        return {"image": windows, "windows": places, "size": size, "label": labels, "id": id, "hash": hash}

    def _normalised(self, image: Tensor) -> Tensor:
        return F.normalize(F.to_dtype(image, torch.float32, scale=True), *self.normalise)


class SegmentationCollate:
    """Entries -> one batch; ``size`` (H, W) shapes a batch none of whose images could be decoded."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, entries: Sequence[Entry]) -> dict[str, Any] | UserError:
        for entry in entries:
            if isinstance(entry, UserError):
                return entry
        decoded = [entry for entry in entries if isinstance(entry, dict)]
        training = bool(decoded) and "windows" not in decoded[0]
        labels = [entry["label"] for entry in decoded]
        images = [entry["image"] for entry in decoded]
        return {
            "image": torch.cat(images) if images else torch.empty(0, 3, *self.size),
            "label": torch.stack(labels) if training else labels,
            **{key: [entry.get(key) for entry in decoded] for key in ("windows", "size", "id", "hash")},
            "skipped": [entry.id for entry in entries if isinstance(entry, Skipped)],
        }


def _class_names(classes: int | Sequence[str]) -> tuple[str, ...]:
    if isinstance(classes, int):
        check_number("dataset.classes", classes, int, 2, IGNORE)
        return tuple(map(str, range(classes)))
    if not isinstance(classes, Sequence) or isinstance(classes, str) or not 2 <= len(classes) <= IGNORE:
        raise UserError(f"dataset.classes={classes}: expected 2 to {IGNORE} names, or how many classes there are.")
    return tuple(map(str, classes))


def _augmentation(size: tuple[int, int], options: Mapping[str, Any]) -> RandomWindow:
    expected = {"scale", "color_jitter"}
    if not isinstance(options, Mapping) or set(options) != expected:
        raise UserError(f"dataset.train_transform={options}: expected {', '.join(sorted(expected))}.")
    scale, color_jitter = options["scale"], options["color_jitter"]
    if not isinstance(scale, Sequence) or len(scale) != 2:
        raise UserError(f"dataset.train_transform.scale={scale}: expected two factors, the least and the largest.")
    for value in scale:
        check_number("dataset.train_transform.scale", value, float, 0.05, 20)
    if scale[0] > scale[1]:
        raise UserError(f"dataset.train_transform.scale={scale}: expected the least factor before the largest.")
    check_number("dataset.train_transform.color_jitter", color_jitter, float, 0, 1)
    return RandomWindow(size, (scale[0], scale[1]), color_jitter)
