"""Evaluation of a segmenter: the confusion matrix of every image at every operating point."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtr_lab.data.segmentation.label_maps import IGNORE
from mtr_lab.results.segmentations import Segmentations
from mtr_lab.tasks.evaluation import Evaluation, OperatingPoint, check_finite
from mtr_lab.tasks.segmentation.model import Segmenter, classify_pixels


class SegmentedBatch(NamedTuple):
    """Results of the images of a batch that could be read, at p points; K classes."""

    ids: np.ndarray  # (B,) str
    hashes: np.ndarray
    labels: list[np.ndarray]  # by image: pixels of every class, (K,) int64
    confusion: list[list[np.ndarray]]  # by point and image: (K, K) int32
    skipped: list[str]  # names of the images that could not be read


class SegmentationEvaluation(Evaluation[SegmentedBatch]):
    """Collects the confusion matrix of every image at every point; the model is a segmenter."""

    model: Segmenter

    def forward_at(self, point: OperatingPoint, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) that fill the model's input to logits (B, K, H, W) at one point."""
        self.reduction.use(point.schedule)
        return self.model(images)

    def segment_at(self, point: OperatingPoint, batch: Mapping[str, Any]) -> list[Tensor]:
        """The class of every pixel at one point, see :func:`classify_pixels`.

        Raises:
            UserError: the model's outputs are not finite.
        """
        windows = batch["image"]
        logits = torch.cat(self.in_parts(lambda part: self.forward_at(point, windows[part]), len(windows)))
        check_finite(logits, point)
        return classify_pixels(logits, batch)

    def test_step(self, batch: Mapping[str, Any], index: int) -> None:
        classes = self.model.head.num_classes
        counts = [label_counts(labels, classes) for labels in batch["label"]]
        confusion = [
            [
                confusion_matrix(predicted, labels, classes).cpu().numpy().astype(np.int32)
                for predicted, labels in zip(self.segment_at(point, batch), batch["label"], strict=True)
            ]
            for point in (self.points_in_turn() if len(batch["id"]) else [])
        ]
        self.keep(SegmentedBatch(batch["id"], batch["hash"], counts, confusion, batch["skipped"]))

    def predictions(self) -> Segmentations:
        images, classes = self.image_names(), self.model.head.num_classes
        read = [results for results in self.results if len(results.ids)]
        confusion = [matrix for i in range(len(self.points)) for results in read for matrix in results.confusion[i]]
        return Segmentations(
            **images,
            labels=np.stack([counts for results in read for counts in results.labels]),
            points=np.array([point.name for point in self.points]),
            confusion=np.array(confusion, np.int32).reshape(len(self.points), len(images["ids"]), classes, classes),
        )


def label_counts(labels: Tensor, num_classes: int) -> np.ndarray:
    """The number of pixels of every class in a map (H, W), (K,) int64."""
    return torch.bincount(labels.flatten().long(), minlength=IGNORE + 1)[:num_classes].cpu().numpy()


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Pixels by label (row) and predicted class (column), (K, K) int64, of two maps (H, W), without ignored pixels."""
    counted = labels != IGNORE
    pairs = labels[counted].long() * num_classes + predicted[counted]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
