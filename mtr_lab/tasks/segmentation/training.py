"""Training a segmenter."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.losses import DiceLoss
from torch import Tensor

from mtr_lab.backbones.graphed_training import GraphedTraining
from mtr_lab.data.segmentation.label_maps import IGNORE
from mtr_lab.results.metrics.miou import mean_iou
from mtr_lab.tasks.dense_training import DenseTraining
from mtr_lab.tasks.segmentation.evaluation import confusion_matrix
from mtr_lab.tasks.segmentation.model import Segmenter, classify_pixels


class SegmentationTraining(DenseTraining):
    """Cross-entropy, weighted by :func:`class_weights`, plus the Dice loss of the classes in the batch.

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
        self._logits: Callable[[Tensor], Tensor] = (
            GraphedTraining(segmenter, segmenter.backbone) if cuda_graph else segmenter.__call__
        )
        classes = segmenter.head.num_classes
        self.register_buffer("class_weights", torch.ones(classes))
        self.dice = DiceLoss("multiclass", ignore_index=IGNORE)
        self._confusion = torch.zeros(classes, classes, dtype=torch.int64)

    def setup(self, stage: str) -> None:
        """Weigh the classes by their pixels in the datamodule's training images."""
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
        predictions = classify_pixels(self.model(batch["image"]), batch)
        for predicted, labels in zip(predictions, batch["label"], strict=True):
            self._confusion += confusion_matrix(predicted, labels, len(self._confusion)).cpu()

    def on_validation_epoch_end(self) -> None:
        self.log("val_miou", mean_iou(self._confusion.numpy()), prog_bar=True, sync_dist=True)
        self._confusion.zero_()


def class_weights(class_pixels: Tensor) -> Tensor:
    """√(median number of pixels of the classes / number of pixels of the class), (K,); 0 for an absent class."""
    weights = (class_pixels.float().median() / class_pixels.clamp(min=1)).sqrt()
    return torch.where(class_pixels > 0, weights, 0.0)
