"""Detection data for Lightning: training, held-out and evaluation images with their objects."""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from faster_coco_eval.core import mask as coco_masks
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset, Subset

from mtr_lab.data.classes import map_classes
from mtr_lab.data.coco import CocoSource
from mtr_lab.data.datamodule import EpochShuffle, is_held_out
from mtr_lab.data.folders import find_root
from mtr_lab.data.images import Entry, ImageLoader, Skipped, decode, reason, undecodable
from mtr_lab.data.objects import Objects, ObjectSource
from mtr_lab.data.voc import VocSource
from mtr_lab.data.windows import Augmentation, Canvas, Scene
from mtr_lab.errors import UserError, check_number, unknown

SOURCES: dict[str, type[VocSource] | type[CocoSource]] = {"voc": VocSource, "coco": CocoSource}


class DetectionDataModule(LightningDataModule):
    """Images with objects, as batches that a detector takes.

    All images are brought onto one canvas, the model's input, which they fill as far as their shape allows, from the
    top left; the rest is of the mean colour. So every image has the same number of tokens. A batch of B images is
    {"image": (B, 3, H, W), "size": B (height, width) of what an image covers of it, "original_size": B (height, width),
    "objects": B dicts, "id", "hash", "skipped"}. Of objects there are ``boxes`` (n, 4) float32, left, top, right,
    bottom, ``labels`` (n,) int64 from 0 and, if asked for, ``masks`` (n, ·, ·) uint8: while training in pixels of the
    canvas, without those to ignore; else in pixels of the original image, with ``iscrowd`` (n,) for those.

    Args:
        name: what the dataset is called in results and messages.
        data_config: timm's ``input_size`` (3, H, W), ``mean``, ``std``.
        root: the directory; ``pkg://package/path`` inside an installed package.
        source: ``"voc"`` or ``"coco"``: how it is annotated, see :class:`VocSource` and :class:`CocoSource`.
        classes: names in the order of the labels, if not all that occur.
        train_split, test_split: names of splits.
        masks: read outlines as well, which VOC's boxes do not have.
        holdout: share of the training images kept for validation while training, chosen by a hash of their ids.
        batch_size, num_workers, on_error: as those of ``ImageDataModule``.
        model_classes, num_classes: of the model's outputs, if it has weights already.
        train_transform: ``scale``, ``turns`` and ``color_jitter`` of :class:`Augmentation`.
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
        source: str,
        classes: Sequence[str] | None = None,
        train_split: str = "train",
        test_split: str = "val",
        masks: bool = False,
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
        if source not in SOURCES:
            raise unknown("dataset.source", source, SOURCES)
        if on_error not in ("fail", "skip"):
            raise unknown("dataset.on_error", on_error, ["fail", "skip"])
        if masks and source == "voc":
            raise UserError("dataset.source=voc has boxes alone: outlines need dataset.source=coco.")
        check_number("dataset.holdout", holdout, float, 0, 0.99)
        check_number("dataset.batch_size", batch_size, int, 1)
        check_number("dataset.num_workers", num_workers, int, 0)
        self.name = str(name)
        self._root = find_root(self.name, None if root is None else str(root))
        self._open = SOURCES[source]
        self._classes = classes
        self._train_split, self._test_split = str(train_split), str(test_split)
        self._masks, self._holdout, self._on_error, self._seed = masks, holdout, on_error, seed
        self._batch_size, self._num_workers = batch_size, min(num_workers, os.cpu_count() or 1)
        self._mean, self._std = data_config["mean"], data_config["std"]
        self._canvas = Canvas(tuple(data_config["input_size"][1:]), tuple(255 * value for value in self._mean))
        self._augmentation = _augmentation(self._canvas, train_transform)
        self._test_source = self._source(self._test_split)
        self.class_names: Sequence[str] = model_classes or self._test_source.classes
        self.num_classes = num_classes or len(self.class_names)
        self._test_labels = map_classes(self._test_source.classes, model_classes, self.num_classes)
        self.num_images = len(self._test_source)

    def identity(self) -> str:
        """A hash of the evaluation images and their annotations that is cheap to have and changes when they do."""
        return self._test_source.identity()

    def setup(self, stage: str) -> None:
        """Open the training images if ``stage`` is ``"fit"``, so that what is wrong with them shows at once."""
        if stage == "fit":
            _ = self._train_source

    def train_dataloader(self) -> ImageLoader:
        """The training images that are not held out, shuffled and augmented, in full batches."""
        kept = self._training_indices(held_out=False)
        if len(kept) < self._batch_size:
            raise UserError(
                f"dataset.batch_size={self._batch_size} is more than the {len(kept)} training images: lower it."
            )
        dataset = self._dataset(self._train_source, self._train_labels, augmentation=self._augmentation)
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
        dataset = self._dataset(self._train_source, self._train_labels)
        return self._loader(Subset(dataset, held_out), persistent_workers=self._num_workers > 0)

    def test_dataloader(self) -> ImageLoader:
        """The evaluation images, in the same order and batches every time."""
        return self._loader(self._dataset(self._test_source, self._test_labels))

    def probe_images(self, count: int) -> Tensor:
        """Training images, spread evenly over the split, as for evaluation: (count, 3, H, W), or as many as there are.

        Raises:
            UserError: there are no training images, or they are the evaluation images.
        """
        if self._train_split == self._test_split:
            raise UserError(
                f"dataset.train_split and dataset.test_split are both {self._test_split}: what is chosen on training "
                "images cannot be evaluated on the same ones. Set dataset.train_split to another split."
            )
        dataset = self._dataset(self._train_source, self._train_labels)
        some = min(count, len(dataset))
        loader = self._loader(Subset(dataset, [i * len(dataset) // some for i in range(some)]))
        images = torch.cat([batch["image"] for batch in loader])
        if not len(images):
            raise UserError(f"not one of {some} training images of {self.name} could be read.")
        return images

    def _source(self, split: str) -> ObjectSource:
        source: ObjectSource = self._open(self._root, split, self._classes)
        if source.degenerate:
            print(f"{source.location}: {source.degenerate} boxes without area are left out.")
        return source

    @cached_property
    def _train_source(self) -> ObjectSource:
        return self._source(self._train_split)

    @property
    def _train_labels(self) -> list[int] | None:
        return map_classes(self._train_source.classes, self.class_names, self.num_classes)

    def _training_indices(self, held_out: bool) -> list[int]:
        source = self._train_source
        return [i for i in range(len(source)) if is_held_out(source.id(i), self._holdout) == held_out]

    def _dataset(
        self, source: ObjectSource, label_map: Sequence[int] | None, augmentation: Augmentation | None = None
    ) -> "DetectionImages":
        normalise = tuple(self._mean), tuple(self._std)
        return DetectionImages(
            source, label_map, self._canvas, augmentation, normalise, masks=self._masks, on_error=self._on_error
        )

    def _loader(self, dataset: Dataset[Entry], **options: Any) -> ImageLoader:
        return ImageLoader(
            dataset,
            batch_size=self._batch_size,
            num_workers=self._num_workers,
            collate_fn=DetectionCollate(self._canvas.size),
            pin_memory=torch.cuda.is_available(),
            **options,
        )


class DetectionImages(Dataset[Entry]):
    """Entries of a batch as ``DetectionDataModule`` describes it, augmented ones for training or original ones."""

    def __init__(
        self,
        source: ObjectSource,
        label_map: Sequence[int] | None,
        canvas: Canvas,
        augmentation: Augmentation | None,
        normalise: tuple[Sequence[float], Sequence[float]],
        *,
        masks: bool,
        on_error: str,
    ) -> None:
        self.source, self.label_map = source, label_map
        self.canvas, self.augmentation, self.normalise = canvas, augmentation, normalise
        self.masks, self.on_error = masks, on_error

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Entry:
        id, objects = self.source.id(index), self.source.objects(index)
        try:
            decoded, hash = decode(self.source.path(index).read_bytes())
        except Exception as error:  # damaged bytes make Pillow raise anything from OSError to struct.error
            return undecodable(id, self.source.location, reason(error), self.on_error)
        image = F.pil_to_tensor(decoded)
        height, width = image.shape[-2:]
        boxes = torch.from_numpy(objects.boxes).clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        if len(boxes) and not bool((boxes[:, 2:] > boxes[:, :2]).all()):
            return UserError(f"image {id} of {self.source.location}: a box lies beyond its {width} x {height} pixels.")
        labels = torch.from_numpy(objects.labels)
        labels = labels if self.label_map is None else torch.tensor(self.label_map, dtype=torch.int64)[labels]
        try:
            masks = torch.from_numpy(outline_masks(objects, height, width)) if self.masks else None
        except UserError as error:
            return UserError(f"image {id} of {self.source.location}: {error}")
        ignore = torch.from_numpy(objects.ignore)
        if self.augmentation is None:
            scene = self.canvas.whole(image, boxes, None)
            found = {"boxes": boxes, "labels": labels, "iscrowd": ignore}
            found |= {} if masks is None else {"masks": masks}
        else:
            scene = self.augmentation(image, boxes[~ignore], None if masks is None else masks[~ignore])
            found = {"boxes": scene.boxes, "labels": labels[~ignore][scene.kept]}
            found |= {} if scene.masks is None else {"masks": scene.masks}
        return {
            "image": self._normalised(scene),
            "size": scene.size,
            "original_size": (height, width),
            "objects": found,
            "id": id,
            "hash": hash,
        }

    def _normalised(self, scene: Scene) -> Tensor:
        return F.normalize(F.to_dtype(scene.image, torch.float32, scale=True), *map(list, self.normalise))


class DetectionCollate:
    """Entries -> one batch; ``size`` (H, W) shapes a batch none of whose images could be decoded."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, entries: Sequence[Entry]) -> dict[str, Any] | UserError:
        for entry in entries:
            if isinstance(entry, UserError):
                return entry
        decoded = [entry for entry in entries if isinstance(entry, dict)]
        images = [entry["image"] for entry in decoded]
        return {
            "image": torch.stack(images) if images else torch.empty(0, 3, *self.size),
            **{key: [entry[key] for entry in decoded] for key in ("size", "original_size", "objects", "id", "hash")},
            "skipped": [entry.id for entry in entries if isinstance(entry, Skipped)],
        }


def outline_masks(objects: Objects, height: int, width: int) -> np.ndarray:
    """Masks (n, height, width) uint8 of an image's objects.

    Raises:
        UserError: an object has no outline, or one that is none.
    """
    masks = np.zeros((len(objects.boxes), height, width), np.uint8)
    for mask, outline in zip(masks, objects.outlines or (), strict=True):
        try:
            mask[:] = coco_masks.decode(_run_lengths(outline, height, width))
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            raise UserError(
                f"an object's segmentation is no outline: {str(outline)[:80]}. Expected polygons [x, y, …] or "
                "run lengths of the image's size."
            ) from error
    return masks


def _run_lengths(outline: Any, height: int, width: int) -> Any:
    """An outline as COCO writes it, in the library's form; what the library would not survive is refused here."""
    if isinstance(outline, dict):
        counts = outline["counts"]
        if list(outline["size"]) != [height, width]:
            raise ValueError("of another size")
        if isinstance(counts, str):
            return outline
        if sum(counts) != height * width:
            raise ValueError("not as many pixels as the image has")
        return coco_masks.frPyObjects(outline, height, width)
    polygons = [[float(value) for value in polygon] for polygon in outline]
    if not all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in polygons):
        raise ValueError("not three points")
    return coco_masks.merge(coco_masks.frPyObjects(polygons, height, width))


def _augmentation(canvas: Canvas, options: Mapping[str, Any]) -> Augmentation:
    expected = {"scale", "turns", "color_jitter"}
    if not isinstance(options, Mapping) or set(options) != expected:
        raise UserError(f"dataset.train_transform={options}: expected {', '.join(sorted(expected))}.")
    scale, turns, color_jitter = options["scale"], options["turns"], options["color_jitter"]
    if not isinstance(scale, Sequence) or len(scale) != 2:
        raise UserError(f"dataset.train_transform.scale={scale}: expected two factors, the least and the largest.")
    for value in scale:
        check_number("dataset.train_transform.scale", value, float, 0.05, 20)
    if scale[0] > scale[1]:
        raise UserError(f"dataset.train_transform.scale={scale}: expected the least factor before the largest.")
    if not isinstance(turns, bool):
        raise UserError(f"dataset.train_transform.turns={turns}: expected true or false.")
    check_number("dataset.train_transform.color_jitter", color_jitter, float, 0, 1)
    return Augmentation(canvas, (scale[0], scale[1]), turns, color_jitter)
