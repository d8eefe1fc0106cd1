"""The optimizer and the learning rates of every task's training."""

from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR


def adamw(groups: list[dict[str, Any]], trainer: Trainer, lr: float, warmup_epochs: int) -> OptimizerLRScheduler:
    """AdamW on groups of parameters, its learning rate rising linearly to ``lr`` and falling by a cosine.

    One kernel does all of a step on a GPU, unless a scaler (precision 16-mixed) has to clip gradients before it.
    """
    fused = trainer.strategy.root_device.type == "cuda" and trainer.scaler is None
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=fused, foreach=not fused)
    # Lightning does not clip gradients for an optimizer that might divide them by a scaler's factor; there is none.
    optimizer._step_supports_amp_scaling = False
    steps = int(trainer.estimated_stepping_batches)
    warmup = min(warmup_epochs * steps // max(trainer.max_epochs or 1, 1), steps - 1)
    schedule: LRScheduler = CosineAnnealingLR(optimizer, max(steps - warmup, 1))
    if warmup:
        schedule = SequentialLR(optimizer, [LinearLR(optimizer, 1e-3, total_iters=warmup), schedule], [warmup])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
