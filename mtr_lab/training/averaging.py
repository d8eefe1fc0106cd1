"""The exponential moving average of the weights, which validation and the saved model take."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor


class WeightEMA(Callback):
    """Keeps ``decay`` of the average at every optimizer step and takes the rest from the weights.

    Validation runs on the average, and the module holds it when the fit has ended, also that of a finished run which
    is resumed. A checkpoint has the average as ``state_dict`` and the weights as ``current_model_state``. Counters,
    which have no average, are those of the weights. A step reads nothing from the device.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._average: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}  # the module's own tensors
        self._step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._weights = pl_module.state_dict()
        loaded = self._average or self._weights
        self._average = {name: loaded[name].to(value.device, copy=True) for name, value in self._weights.items()}
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step > self._step:  # not while gradients accumulate
            self._step = trainer.global_step
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights."""
        floats = [name for name, value in self._weights.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self._average[name] for name in floats], [self._weights[name] for name in floats], 1 - self._decay
        )
        for name in self._weights.keys() - floats:
            self._average[name].copy_(self._weights[name])

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self._weights.items():
            weights = value.clone()
            value.copy_(self._average[name])
            self._average[name].copy_(weights)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["current_model_state"], checkpoint["state_dict"] = checkpoint["state_dict"], self._average

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._average = checkpoint["state_dict"]  # which Lightning has just loaded into the module
        pl_module.load_state_dict(checkpoint["current_model_state"])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.load_state_dict(self._average)
