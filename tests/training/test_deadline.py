"""The teacher of Tiny ImageNet ends in time: its cosine is stretched while it trains."""

import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

SCRIPT = Path(__file__).parents[2] / "experiments" / "tiny_imagenet" / "train_teacher.py"
STEPS, WARMUP, PEAK = 10, 20, 1e-3  # steps of an epoch and of the warm-up, and the highest learning rate


@pytest.fixture(scope="module")
def stretch() -> Any:
    return runpy.run_path(str(SCRIPT))["stretch"]


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize("changes", [{1: 6}, {1: 14}, {4: 7, 5: 11}])
def test_the_learning_rate_goes_on_and_ends_at_zero(stretch: Any, warmup: int, changes: dict[int, int]) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule: Any = CosineAnnealingLR(optimizer, 8 * STEPS - warmup)
    if warmup:
        schedule = SequentialLR(optimizer, [LinearLR(optimizer, 1e-3, total_iters=warmup), schedule], [warmup])
    epochs, rates, expected = 8, [], []
    phase, left = 0.0, 8 * STEPS - warmup  # of the cosine: what has passed, 0 to 1, and the steps that remain
    trainer = SimpleNamespace(
        current_epoch=0, num_training_batches=STEPS, lr_scheduler_configs=[SimpleNamespace(scheduler=schedule)]
    )
    while trainer.current_epoch < epochs:
        for _ in range(STEPS):
            rates.append(optimizer.param_groups[0]["lr"])
            expected.append(PEAK * (1 + math.cos(math.pi * phase)) / 2)
            if len(rates) > warmup:
                phase, left = phase + (1 - phase) / left, left - 1
            optimizer.step()
            schedule.step()
        if trainer.current_epoch in changes:
            epochs = changes[trainer.current_epoch]
            stretch(trainer, epochs)
            left = epochs * STEPS - max(len(rates), warmup)
        trainer.current_epoch += 1
    assert len(rates) == epochs * STEPS
    assert optimizer.param_groups[0]["lr"] < 1e-9
    assert rates[warmup:] == pytest.approx(expected[warmup:], abs=1e-9)
