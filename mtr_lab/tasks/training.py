"""Training a classifier."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.data import Mixup
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torchmetrics.classification import MulticlassAccuracy


class GraphedTraining:
    """A model's training pass, forward and backward, as CUDA graphs for batches of the shape of the first one.

    A step of a small model launches thousands of kernels that take less time than their launches. Batches of another
    shape go through the model as it is.

    Source: ``torch.cuda.make_graphed_callables``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._shape: torch.Size | None = None
        self._replay: Callable[[Tensor], Tensor] = model

    def __call__(self, images: Tensor) -> Tensor:
        """What ``model(images)`` returns, with gradients."""
        if self._shape is None:
            self._shape = images.shape
            kind = images.device.type
            # The copies of weights that autocast keeps would be freed at the end of the step, under the graph.
            with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), False):
                graphed: Any = torch.cuda.make_graphed_callables(_Call(self._model), (torch.zeros_like(images),))
            self._replay = graphed
        return self._replay(images) if images.shape == self._shape else self._model(images)


class _Call(nn.Module):
    """``make_graphed_callables`` replaces the ``forward`` of what it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class ClassifierTraining(LightningModule):
    """AdamW with linear warm-up and cosine decay, mixup and cutmix, label smoothing.

    Args:
        model: the classifier to train.
        lr: peak learning rate.
        weight_decay: of weight matrices; biases, norms, embeddings, A and D are exempt.
        warmup_epochs: length of the linear warm-up.
        label_smoothing: share of the target spread over all classes.
        mixup, cutmix: α of the Beta distributions, 0 to leave one out; every batch is mixed by one of the two.
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
        cuda_graph: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self._logits: Callable[[Tensor], Tensor] = GraphedTraining(model) if cuda_graph else model.__call__
        self.lr, self.weight_decay, self.warmup_epochs = lr, weight_decay, warmup_epochs
        self.label_smoothing = label_smoothing
        self.mixup = (
            Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=model.num_classes)
            if mixup or cutmix
            else None
        )
        self.skipped: set[str] = set()
        self.val_top1 = MulticlassAccuracy(model.num_classes, average="micro")

    def training_step(self, batch: Mapping[str, Any], index: int) -> Tensor | None:
        self.skipped.update(batch["skipped"])
        images, labels = batch["image"], batch["label"]
        if self.mixup is not None and len(images) % 2:  # an image was skipped; mixing takes pairs
            images, labels = images[:-1], labels[:-1]
        if not len(images):
            return None
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)  # labels become soft, smoothing included
            loss = F.cross_entropy(self._logits(images), labels)
        else:
            loss = F.cross_entropy(self._logits(images), labels, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Mapping[str, Any], index: int) -> None:
        self.skipped.update(batch["skipped"])
        if not len(batch["id"]):
            return
        logits = self.model(batch["image"])
        self.val_top1(logits, batch["label"])
        loss = F.cross_entropy(logits, batch["label"])
        self.log("val_loss", loss, on_epoch=True, batch_size=len(logits))
        self.log("val_top1", self.val_top1, on_epoch=True, prog_bar=True, batch_size=len(logits))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        exempt: Any = self.model.no_weight_decay()
        groups = param_groups_weight_decay(self.model, self.weight_decay, exempt)
        return adamw(groups, self.trainer, self.lr, self.warmup_epochs)


def adamw(groups: list[dict[str, Any]], trainer: Trainer, lr: float, warmup_epochs: int) -> OptimizerLRScheduler:
    """AdamW on groups of parameters, its learning rate rising linearly to ``lr`` and falling by a cosine."""
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=on_gpu or None)
    steps = int(trainer.estimated_stepping_batches)
    warmup = min(warmup_epochs * steps // max(trainer.max_epochs or 1, 1), steps - 1)
    cosine = CosineAnnealingLR(optimizer, max(steps - warmup, 1))
    schedule = SequentialLR(optimizer, [LinearLR(optimizer, 1e-3, total_iters=max(warmup, 1)), cosine], [warmup])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
