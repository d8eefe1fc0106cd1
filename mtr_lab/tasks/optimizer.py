"""The optimizer and the learning rates of every task's training."""

from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR


def adamw(groups: list[dict[str, Any]], trainer: Trainer, lr: float, warmup_epochs: int) -> OptimizerLRScheduler:
    """AdamW on groups of parameters, its learning rate rising linearly to ``lr`` and falling by a cosine."""
    optimizer = torch.optim.AdamW(groups, lr=lr)
    steps = int(trainer.estimated_stepping_batches)
    warmup = min(warmup_epochs * steps // max(trainer.max_epochs or 1, 1), steps - 1)
    cosine = CosineAnnealingLR(optimizer, max(steps - warmup, 1))
    schedule = SequentialLR(optimizer, [LinearLR(optimizer, 1e-3, total_iters=max(warmup, 1)), cosine], [warmup])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
