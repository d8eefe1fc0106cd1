"""The optimizer of every task's training."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from mtr_lab.tasks.optimizer import adamw


@pytest.mark.parametrize(
    ("device", "scaler", "fused"), [("cpu", None, False), ("cuda", None, True), ("cuda", object(), False)]
)
def test_gradients_are_clipped_whichever_kernel_makes_the_step(device: str, scaler: object, fused: bool) -> None:
    layer = nn.Linear(3, 2)
    strategy = SimpleNamespace(root_device=torch.device(device))
    trainer = SimpleNamespace(strategy=strategy, scaler=scaler, estimated_stepping_batches=10, max_epochs=2)
    optimizer = adamw([{"params": layer.parameters()}], trainer, 1e-3, 1)["optimizer"]
    assert bool(optimizer.defaults["fused"]) == fused
    (100 * layer(torch.ones(1, 3))).sum().backward()
    MixedPrecision("bf16-mixed", "cpu").clip_gradients(optimizer, 1.0)
    assert torch.cat([parameter.grad.flatten() for parameter in layer.parameters()]).norm() < 1.01
    optimizer.step()


@pytest.mark.parametrize(("warmup_epochs", "first", "peak"), [(1, 1e-4, 5), (0, 0.1, 0)])
def test_the_learning_rate_rises_and_falls(warmup_epochs: int, first: float, peak: int) -> None:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(strategy=strategy, scaler=None, estimated_stepping_batches=20, max_epochs=4)
    made = adamw([{"params": nn.Linear(1, 1).parameters()}], trainer, 0.1, warmup_epochs)
    rates = []
    for _ in range(20):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert rates[0] == pytest.approx(first)
    assert max(rates) == rates[peak] == pytest.approx(0.1)
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert made["optimizer"].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
