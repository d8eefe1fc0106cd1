"""Segmentation: training a head with its backbone, and evaluating both at every operating point."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from segmentation_models_pytorch.losses import DiceLoss
from timm.optim import param_groups_weight_decay
from torch import Tensor

from mtr_lab.data.label_maps import IGNORE
from mtr_lab.report.segmentations import mean_iou
from mtr_lab.tasks.segmenter import Segmenter
from mtr_lab.tasks.training import GraphedTraining, adamw


class SegmentationTraining(LightningModule):
    """Cross-entropy, rare classes weighing more, and the Dice loss of the classes in the batch.

    Args:
        segmenter: to train.
        class_pixels: (K,) how many pixels of each class the training images have. A class weighs the square root of
            the median of those over its own.
        lr, weight_decay, warmup_epochs: as in :func:`adamw`.
        cuda_graph: replay the model's passes, see :class:`GraphedTraining`.

    ``skipped`` holds the names of the images that could not be read.
    """

    class_weights: Tensor

    def __init__(
        self,
        segmenter: Segmenter,
        class_pixels: Tensor,
        *,
        lr: float,
        weight_decay: float,
        warmup_epochs: int,
        cuda_graph: bool = False,
    ) -> None:
        super().__init__()
        self.model = segmenter
        self._logits: Callable[[Tensor], Tensor] = GraphedTraining(segmenter) if cuda_graph else segmenter.__call__
        self.lr, self.weight_decay, self.warmup_epochs = lr, weight_decay, warmup_epochs
        self.skipped: set[str] = set()
        weights = (class_pixels.float().median() / class_pixels.clamp(min=1)).sqrt()
        self.register_buffer("class_weights", torch.where(class_pixels > 0, weights, 0.0))
        self.dice = DiceLoss("multiclass", ignore_index=IGNORE)
        self._confusion = torch.zeros(len(class_pixels), len(class_pixels), dtype=torch.int64)

    def training_step(self, batch: Mapping[str, Any], index: int) -> Tensor | None:
        self.skipped.update(batch["skipped"])
        if not batch["id"]:
            return None
        logits = self._logits(batch["image"])
        entropy = F.cross_entropy(logits, batch["label"], self.class_weights, ignore_index=IGNORE)
        dice = self.dice(logits, batch["label"])
        shown = {"train_loss": entropy + dice, "train_entropy": entropy, "train_dice": dice}
        self.log_dict(shown, on_step=False, on_epoch=True, batch_size=len(batch["id"]))
        return entropy + dice

    def validation_step(self, batch: Mapping[str, Any], index: int) -> None:
        self.skipped.update(batch["skipped"])
        if not batch["id"]:
            return
        for found, labels in zip(self.model.segment(batch), batch["label"], strict=True):
            self._confusion += confusion_matrix(found, labels, len(self._confusion)).cpu()

    def on_validation_epoch_end(self) -> None:
        self.log("val_miou", mean_iou(self._confusion.numpy()), prog_bar=True)
        self._confusion.zero_()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        exempt: Any = [f"backbone.{name}" for name in self.model.backbone.no_weight_decay()]
        groups = param_groups_weight_decay(self.model, self.weight_decay, exempt)
        return adamw(groups, self.trainer, self.lr, self.warmup_epochs)


def confusion_matrix(found: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Pixels by their class and by the class found, (K, K) int64, of two maps (H, W); those to ignore left out."""
    counted = labels != IGNORE
    pairs = labels[counted].long() * num_classes + found[counted]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
