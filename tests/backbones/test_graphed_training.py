"""Training steps as CUDA graphs, what of them needs no device."""

import pytest
import torch
from torch import nn

from mtr_lab.backbones.graphed_training import GraphedTraining


def test_the_captured_pass_keeps_no_autograd_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the parameters' gradients would be accumulated in the capture's stream, and PyTorch warns."""
    captured = []

    def capture(call: nn.Module, samples: tuple) -> nn.Module:
        captured.append(call(*samples))
        assert captured[-1].requires_grad
        return call

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    model = nn.Linear(3, 2)
    model.reduction = None
    logits = GraphedTraining(model, model)(torch.randn(4, 3))
    assert not captured[0].requires_grad
    logits.sum().backward()
    assert model.weight.grad is not None
