"""Training a head with the backbone below it, by a sum of losses."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from mtr_lab.tasks.optimizer import adamw


class DenseTraining(LightningModule, ABC):
    """AdamW on the sum of a dense model's losses.

    Args:
        model: to train; has a ``backbone``.
        lr, weight_decay, warmup_epochs: as in :func:`adamw`.

    ``skipped`` holds the names of the images that could not be read.
    """

    def __init__(self, model: nn.Module, *, lr: float, weight_decay: float, warmup_epochs: int) -> None:
        super().__init__()
        self.model: Any = model
        self.lr, self.weight_decay, self.warmup_epochs = lr, weight_decay, warmup_epochs
        self.skipped: set[str] = set()

    @abstractmethod
    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The terms of the loss by name, scalars, of a batch that has images."""

    def training_step(self, batch: Mapping[str, Any], index: int) -> Tensor | None:
        self.skipped.update(batch["skipped"])
        if not len(batch["id"]):
            return None
        losses = self.losses(batch)
        loss = torch.stack(list(losses.values())).sum()
        shown = {"train_loss": loss, **{f"train_{name}": value for name, value in losses.items()}}
        self.log_dict(shown, on_step=False, on_epoch=True, batch_size=len(batch["id"]))
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        exempt: Any = [f"backbone.{name}" for name in self.model.backbone.no_weight_decay()]
        groups = param_groups_weight_decay(self.model, self.weight_decay, exempt)
        return adamw(groups, self.trainer, self.lr, self.warmup_epochs)
