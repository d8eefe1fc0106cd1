"""Evaluating a segmenter: the confusion matrix of every image at every operating point."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtr_lab.data.segmentation.label_maps import IGNORE
from mtr_lab.results.segmentations import Segmentations
from mtr_lab.tasks.evaluation import BatchedEvaluation, OperatingPoint, check_finite
from mtr_lab.tasks.segmentation.model import Segmenter, classify_pixels


class SegmentedBatch(NamedTuple):
    """What is known of the images of a batch that could be read, at p points; K classes."""

    ids: np.ndarray  # (B,) str
    hashes: np.ndarray
    labels: list[np.ndarray]  # of each (K,) int64
    confusion: list[list[np.ndarray]]  # at each point, of each (K, K) int32
    skipped: list[str]  # ids of the others


class SegmentationEvaluation(BatchedEvaluation[SegmentedBatch]):
    """Collects the confusion matrix of every image at every point; the model is a segmenter."""

    model: Segmenter

    def forward_at(self, point: OperatingPoint, images: Tensor) -> Tensor:
        """Logits (B, K, H, W) at one point of images (B, 3, H, W) that fill the model's input."""
        self.reduction.use(point.schedule)
        return self.model(images)

    def segment_at(self, point: OperatingPoint, batch: Mapping[str, Any]) -> list[Tensor]:
        """The classes found at one point, see :func:`classify_pixels`.

        Raises:
            UserError: the model's outputs are not numbers.
        """
        logits = self.forward_at(point, batch["image"])
        check_finite(logits, point)
        return classify_pixels(logits, batch)

    def test_step(self, batch: Mapping[str, Any], index: int) -> None:
        classes = self.model.head.num_classes
        counts = [label_counts(labels, classes) for labels in batch["label"]]
        confusion = [
            [
                confusion_matrix(found, labels, classes).cpu().numpy().astype(np.int32)
                for found, labels in zip(self.segment_at(point, batch), batch["label"], strict=True)
            ]
            for point in (self.points if len(batch["id"]) else [])
        ]
        self.keep(SegmentedBatch(batch["id"], batch["hash"], counts, confusion, batch["skipped"]))

    def predictions(self) -> Segmentations:
        """The confusion matrices of every image that could be read, at every point.

        Raises:
            UserError: no image could be read.
        """
        images, classes = self.images(), self.model.head.num_classes
        read = [batch for batch in self.batches if len(batch.ids)]
        confusion = [each for i in range(len(self.points)) for batch in read for each in batch.confusion[i]]
        return Segmentations(
            **images,
            labels=np.stack([each for batch in read for each in batch.labels]),
            points=np.array([point.name for point in self.points]),
            confusion=np.array(confusion, np.int32).reshape(len(self.points), len(images["ids"]), classes, classes),
        )


def label_counts(labels: Tensor, num_classes: int) -> np.ndarray:
    """How many pixels of each class a map (H, W) has, (K,) int64."""
    return torch.bincount(labels.flatten().long(), minlength=IGNORE + 1)[:num_classes].cpu().numpy()


def confusion_matrix(found: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Pixels by their class and by the class found, (K, K) int64, of two maps (H, W); those to ignore left out."""
    counted = labels != IGNORE
    pairs = labels[counted].long() * num_classes + found[counted]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
