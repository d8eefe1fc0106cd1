"""Detection data for Lightning: training, held-out and evaluation images with their objects."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_masks
from torch import Tensor

from mtr_lab.data.annotated import AnnotatedImages, Reading
from mtr_lab.data.batches import EntryCollate
from mtr_lab.data.classes import map_classes
from mtr_lab.data.detection.coco import CocoSource
from mtr_lab.data.detection.objects import Objects, ObjectSource
from mtr_lab.data.detection.transforms import Augmentation, Canvas
from mtr_lab.data.detection.voc import VocSource
from mtr_lab.data.folders import find_root
from mtr_lab.data.orientation import Orientation, before, turned, turned_boxes
from mtr_lab.data.random_crop import check_train_transform
from mtr_lab.data.splits import SplitDataModule
from mtr_lab.errors import UserError, unknown

SOURCES: dict[str, type[VocSource] | type[CocoSource]] = {"voc": VocSource, "coco": CocoSource}


class DetectionDataModule(SplitDataModule[ObjectSource]):
    """Detection images with boxes and, for COCO, masks.

    Every image is scaled to fit the model's input size, placed at the top left, and padded with the mean colour, so
    that all images have the same number of tokens. A batch of B images is a dictionary of

    * ``image``: (B, 3, H, W) float32, normalised;
    * ``size``, ``original_size``: B pairs (height, width) of the scaled image and of the original one;
    * ``objects``: B dictionaries of ``boxes`` (n, 4) float32 (left, top, right, bottom), ``labels`` (n,) int64 from 0
      and, with ``masks``, ``masks`` (n, height, width) uint8. For training, they are in pixels of the input, without
      ignored objects. For evaluation, they are in pixels of the original image; ``iscrowd`` (n,) marks ignored objects;
    * ``id``, ``hash``, ``skipped``: see :class:`~mtr_lab.data.batches.EntryCollate`.

    Args:
        data_config: timm's ``input_size`` (3, H, W), ``mean``, ``std``.
        root: the dataset's directory; ``pkg://package/path`` is a directory in an installed package.
        source: format of the annotations: ``"voc"`` (:class:`VocSource`) or ``"coco"`` (:class:`CocoSource`).
        classes: names in label order; by default all classes of the annotations.
        masks: decode masks from COCO's segmentations.
        model_classes, num_classes: classes of a model that has weights; by default those of the dataset.
        train_transform: ``scale``, ``turns`` and ``color_jitter`` of :class:`Augmentation`.
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
        source: str,
        classes: Sequence[str] | None = None,
        masks: bool = False,
        model_classes: Sequence[str] | None = None,
        num_classes: int | None = None,
        train_transform: Mapping[str, Any],
        **split: Any,
    ) -> None:
        super().__init__(**split)
        if source not in SOURCES:
            raise unknown("dataset.source", source, SOURCES)
        if masks and source == "voc":
            raise UserError("dataset.source=voc has boxes only: masks need dataset.source=coco.")
        self._root = find_root(self.name, None if root is None else str(root), of_classes=False)
        self._kind, self._classes, self._masks = SOURCES[source], classes, masks
        self._normalise = data_config["mean"], data_config["std"]
        fill = tuple(255 * value for value in data_config["mean"])
        self._canvas = Canvas(tuple(data_config["input_size"][1:]), fill)
        self._collate = DetectionCollate(self._canvas.size)
        self._augmentation = _augmentation(self._canvas, train_transform)
        self.class_names: Sequence[str] = model_classes or self._test_source.classes
        self.num_classes = num_classes or len(self.class_names)
        self._test_labels = map_classes(self._test_source.classes, model_classes, self.num_classes)
        self.num_images = len(self._test_source)

    def _open(self, split: str, training: bool) -> ObjectSource:
        source: ObjectSource = self._kind(self._root, split, self._classes)
        if source.degenerate:
            print(f"{source.location}: {source.degenerate} boxes without area are left out.")
        return source

    def _training_images(self, augmented: bool) -> "DetectionImages":
        labels = map_classes(self._train_source.classes, self.class_names, self.num_classes)
        return self._images(self._train_source, labels, self._augmentation if augmented else None)

    def _evaluation_images(self) -> "DetectionImages":
        return self._images(self._test_source, self._test_labels, None)

    def _images(
        self, source: ObjectSource, label_map: Sequence[int] | None, augmentation: Augmentation | None
    ) -> "DetectionImages":
        return DetectionImages(
            source,
            label_map,
            self._canvas,
            augmentation,
            self._normalise,
            masks=self._masks,
            reading=Reading(self._on_error, self._exif, self._remarks),
        )


class DetectionImages(AnnotatedImages[ObjectSource]):
    """Entries of ``DetectionDataModule``'s batches, augmented if there is an ``augmentation``."""

    def __init__(
        self,
        source: ObjectSource,
        label_map: Sequence[int] | None,
        canvas: Canvas,
        augmentation: Augmentation | None,
        normalise: tuple[Sequence[float], Sequence[float]],
        *,
        masks: bool,
        reading: Reading,
    ) -> None:
        super().__init__(source, normalise, reading)
        self.label_map, self.canvas, self.augmentation, self.masks = label_map, canvas, augmentation, masks

    def annotated(self, index: int, image: Tensor, orientation: Orientation) -> dict[str, Any]:
        name, objects = f"image {self.source.id(index)} of {self.source.location}", self.source.objects(index)
        size = (image.shape[-2], image.shape[-1])
        turn = orientation.turn(objects.size, size, f"the annotation of {name}")
        height, width = before(turn, size)
        boxes = torch.from_numpy(objects.boxes).clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        if len(boxes) and not bool((boxes[:, 2:] > boxes[:, :2]).all()):
            raise UserError(f"{name}: a box lies outside its {width} x {height} pixels.")
        labels = torch.from_numpy(objects.labels)
        labels = labels if self.label_map is None else torch.tensor(self.label_map, dtype=torch.int64)[labels]
        try:
            masks = torch.from_numpy(turned(decode_masks(objects, height, width), turn)) if self.masks else None
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        boxes = turned_boxes(boxes, turn, size)
        ignore = torch.from_numpy(objects.ignore)
        if self.augmentation is None:
            scene = self.canvas.whole(image, boxes, None)
            target = {"boxes": boxes, "labels": labels, "iscrowd": ignore}
            target |= {} if masks is None else {"masks": masks}
        else:
            scene = self.augmentation(image, boxes[~ignore], None if masks is None else masks[~ignore])
            target = {"boxes": scene.boxes, "labels": labels[~ignore][scene.kept]}
            target |= {} if scene.masks is None else {"masks": scene.masks}
        return {
            "image": self.normalised(scene.image),
            "size": scene.size,
            "original_size": size,
            "objects": target,
        }


class DetectionCollate(EntryCollate):
    """Batches as described at ``DetectionDataModule``; ``size`` (H, W) is the shape of a batch without images."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def stack(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        images = [entry["image"] for entry in entries]
        return {
            "image": torch.stack(images) if images else torch.empty(0, 3, *self.size),
            **{key: [entry[key] for entry in entries] for key in ("size", "original_size", "objects")},
        }


def decode_masks(objects: Objects, height: int, width: int) -> np.ndarray:
    """Masks (n, height, width) uint8 of an image's objects.

    Raises:
        UserError: an object's segmentation is missing or invalid.
    """
    masks = np.zeros((len(objects.boxes), height, width), np.uint8)
    for mask, segmentation in zip(masks, objects.segmentations or (), strict=True):
        try:
            mask[:] = coco_masks.decode(_to_rle(segmentation, height, width))
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, RuntimeError) as error:
            raise UserError(
                f"an object's segmentation is invalid: {str(segmentation)[:80]}. Expected polygons [x, y, …] or "
                "run lengths of the image's size."
            ) from error
    return masks


def _to_rle(segmentation: Any, height: int, width: int) -> Any:
    """COCO's polygons or run lengths -> the library's run lengths; raises where the library would crash."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        if list(segmentation["size"]) != [height, width]:
            raise ValueError("wrong size")
        if isinstance(counts, str):
            counts = _uncompressed(counts)
        if min(counts, default=0) < 0 or sum(counts) != height * width:
            raise ValueError("wrong number of pixels")
        if isinstance(segmentation["counts"], str):
            return segmentation
        return coco_masks.frPyObjects(segmentation, height, width)
    polygons = [[float(value) for value in polygon] for polygon in segmentation]
    if not polygons or not all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in polygons):
        raise ValueError("fewer than three points")
    most = 2 * max(height, width)  # the library walks along the edges in fifths of a pixel
    if not all(-most <= value <= most for polygon in polygons for value in polygon):
        raise ValueError("far outside the image")
    return coco_masks.merge(coco_masks.frPyObjects(polygons, height, width))


def _uncompressed(text: str) -> list[int]:
    """COCO's run lengths as text -> numbers: six bits a character, the lowest first, differences from the third on."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError("not run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("run lengths that end too early")
    return counts


def _augmentation(canvas: Canvas, options: Mapping[str, Any]) -> Augmentation:
    check_train_transform(options, "turns")
    (low, high), turns = options["scale"], options["turns"]
    if not isinstance(turns, bool):
        raise UserError(f"dataset.train_transform.turns={turns}: expected true or false.")
    return Augmentation(canvas, (low, high), turns, options["color_jitter"])
