"""Segmentation: training a head with its backbone, and evaluating both at every operating point."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.losses import DiceLoss
from torch import Tensor

from mtr_lab.data.segmentation.label_maps import IGNORE
from mtr_lab.results.metrics.miou import mean_iou
from mtr_lab.results.segmentations import Segmentations
from mtr_lab.tasks.classification.training import GraphedTraining
from mtr_lab.tasks.dense_training import DenseTraining
from mtr_lab.tasks.evaluation import BatchedEvaluation, OperatingPoint, check_finite
from mtr_lab.tasks.segmentation.model import Segmenter, classify_pixels


class SegmentationTraining(DenseTraining):
    """Cross-entropy, rare classes weighing more, and the Dice loss of the classes in the batch.

    Args:
        segmenter: to train.
        lr, weight_decay, warmup_epochs: as in :class:`DenseTraining`.
        cuda_graph: replay the model's passes, see :class:`GraphedTraining`.
    """

    class_weights: Tensor

    def __init__(
        self,
        segmenter: Segmenter,
        *,
        lr: float,
        weight_decay: float,
        warmup_epochs: int,
        cuda_graph: bool = False,
    ) -> None:
        super().__init__(segmenter, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs)
        self._logits: Callable[[Tensor], Tensor] = GraphedTraining(segmenter) if cuda_graph else segmenter.__call__
        classes = segmenter.head.num_classes
        self.register_buffer("class_weights", torch.ones(classes))
        self.dice = DiceLoss("multiclass", ignore_index=IGNORE)
        self._confusion = torch.zeros(classes, classes, dtype=torch.int64)

    def setup(self, stage: str) -> None:
        """Weigh the classes by how often the datamodule's training images have them."""
        if stage == "fit":
            self.class_weights.copy_(class_weights(self.trainer.datamodule.class_pixels()))  # type: ignore[attr-defined]

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        logits, labels = self._logits(batch["image"]), batch["label"]
        entropy = F.cross_entropy(logits, labels, self.class_weights, ignore_index=IGNORE)
        return {"entropy": entropy, "dice": self.dice(logits, labels)}

    def validation_step(self, batch: Mapping[str, Any], index: int) -> None:
        self.skipped.update(batch["skipped"])
        if not len(batch["id"]):
            return
        for found, labels in zip(classify_pixels(self.model(batch["image"]), batch), batch["label"], strict=True):
            self._confusion += confusion_matrix(found, labels, len(self._confusion)).cpu()

    def on_validation_epoch_end(self) -> None:
        self.log("val_miou", mean_iou(self._confusion.numpy()), prog_bar=True)
        self._confusion.zero_()


def class_weights(class_pixels: Tensor) -> Tensor:
    """Of each class the square root of the median number of pixels over its own, (K,); 0 for one that is absent."""
    weights = (class_pixels.float().median() / class_pixels.clamp(min=1)).sqrt()
    return torch.where(class_pixels > 0, weights, 0.0)


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
