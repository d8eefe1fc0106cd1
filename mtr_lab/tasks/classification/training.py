"""Training a classifier."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.data import Mixup
from timm.optim import param_groups_weight_decay
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from mtr_lab.backbones.graphed_training import GraphedTraining
from mtr_lab.tasks.classification.distillation import Teacher, distillation_loss
from mtr_lab.tasks.empty_batch import loss_of_nothing
from mtr_lab.tasks.optimizer import adamw


class ClassifierTraining(LightningModule):
    """AdamW with linear warm-up and cosine decay, mixup and cutmix, label smoothing.

    Args:
        model: the classifier to train.
        lr: peak learning rate.
        weight_decay: of weight matrices; biases, norms, embeddings, A and D are exempt.
        warmup_epochs: length of the linear warm-up.
        label_smoothing: share of the target spread over all classes.
        mixup, cutmix: α of the Beta distributions, 0 to leave one out; every batch is mixed by one of the two.
        teacher: its answers to the same augmented and mixed images are targets besides the labels.
        distillation: the teacher's share of the loss.
        temperature: see :func:`~mtr_lab.tasks.classification.distillation.distillation_loss`.
        cuda_graph: replay the model's passes, see :class:`GraphedTraining`.

    ``skipped`` holds the names of the images that could not be read.
    """

    def __init__(
        self,
        model: Any,
        *,
        lr: float,
        weight_decay: float,
        warmup_epochs: int,
        label_smoothing: float,
        mixup: float,
        cutmix: float,
        teacher: Teacher | None = None,
        distillation: float = 0.5,
        temperature: float = 1.0,
        cuda_graph: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self._logits: Callable[[Tensor], Tensor] = GraphedTraining(model, model) if cuda_graph else model.__call__
        self.lr, self.weight_decay, self.warmup_epochs = lr, weight_decay, warmup_epochs
        self.label_smoothing = label_smoothing
        self.mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = (
            Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=model.num_classes)
            if mixup or cutmix
            else None
        )
        self.teacher, self.distillation, self.temperature = teacher, distillation, temperature
        self.skipped: set[str] = set()
        self.val_top1 = MulticlassAccuracy(model.num_classes, average="micro")

    def training_step(self, batch: Mapping[str, Any], index: int) -> Tensor | None:
        self.skipped.update(batch["skipped"])
        images, labels = batch["image"], batch["label"]
        if self.mixup is not None and len(images) % 2:  # an image was skipped; mixing takes pairs
            images, labels = images[:-1], labels[:-1]
        if not len(images):
            return loss_of_nothing(self)
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)  # labels become soft, smoothing included
        logits = self._logits(images)
        smoothing = 0.0 if self.mixup is not None else self.label_smoothing
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        if self.teacher is not None:
            loss = loss.lerp(distillation_loss(logits, self.teacher(images), self.temperature), self.distillation)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Mapping[str, Any], index: int) -> None:
        self.skipped.update(batch["skipped"])
        if not len(batch["id"]):
            return
        logits = self.logits_of(batch)
        self.val_top1(logits, batch["label"])
        loss = F.cross_entropy(logits, batch["label"])
        self.log("val_loss", loss, on_epoch=True, sync_dist=True, batch_size=len(logits))
        self.log("val_top1", self.val_top1, on_epoch=True, prog_bar=True, batch_size=len(logits))

    def logits_of(self, batch: Mapping[str, Any]) -> Tensor:
        """The logits (B, K) of a validation batch."""
        logits: Tensor = self.model(batch["image"])
        return logits

    def configure_optimizers(self) -> OptimizerLRScheduler:
        exempt: Any = self.model.no_weight_decay()
        groups = param_groups_weight_decay(self.model, self.weight_decay, exempt)
        return adamw(groups, self.trainer, self.lr, self.warmup_epochs)
