"""Training steps as CUDA graphs: two launches instead of thousands."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class GraphedTraining:
    """A model's training pass, forward and backward, as CUDA graphs for batches of the shape of the first one.

    A step of a small model launches thousands of kernels that take less time than their launches. Batches of another
    shape run without a graph. Another schedule in force is captured anew.

    Source: ``torch.cuda.make_graphed_callables``.

    Args:
        model: to train.
        backbone: the part of it that may be patched.
    """

    def __init__(self, model: nn.Module, backbone: Any) -> None:
        self._model, self._backbone = model, backbone
        self._shape: torch.Size | None = None
        self._schedule: Any = None
        self._replay: Callable[[Tensor], Tensor] = model

    def __call__(self, images: Tensor) -> Tensor:
        """What ``model(images)`` returns, with gradients."""
        if self._shape is None:
            self._shape = images.shape
        if images.shape != self._shape:
            return self._model(images)
        schedule = None if self._backbone.reduction is None else self._backbone.reduction.key
        if self._replay is self._model or schedule != self._schedule:
            self._replay = self._model  # frees the graphs of the schedule before
            self._replay, self._schedule = self._capture(images), schedule
        return self._replay(images)

    def _capture(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        kind, call = images.device.type, _Call(self._model)
        # The copies of weights that autocast keeps would be freed at the end of the step, under the graph.
        with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), False):
            graphed: Any = torch.cuda.make_graphed_callables(call, (images.clone(),))
        # Frees the captured pass's autograd graph, which would tie the parameters' gradients to the capture's stream:
        # every one of them would be handed from stream to stream, and PyTorch warns.
        call.output.detach_()
        gc.collect()
        return graphed


class _Call(nn.Module):
    """``make_graphed_callables`` replaces the ``forward`` of what it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.output: Tensor

    def forward(self, images: Tensor) -> Tensor:
        self.output = self.model(images)
        return self.output
