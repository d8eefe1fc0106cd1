"""Gradients of a function by computing it again under autograd."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def vjp(function: Callable[..., Any], inputs: Sequence[Tensor | None], grads: Any) -> list[Tensor | None]:
    """The vector-Jacobian product of ``function(*inputs)`` with ``grads``, to be called in a backward pass.

    It can be differentiated again if the backward pass itself is recorded (``create_graph=True``).

    Args:
        function: differentiable, from the inputs to a tensor or a tuple of tensors.
        inputs: as a backward pass finds them saved; ``None`` for an optional input that is absent.
        grads: one for each output.

    Returns:
        The gradient of each input, ``None`` where it requires none.
    """
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        # An input may depend on another; a view of each keeps their gradients apart.
        aliases = [
            t if t is None or not t.requires_grad else t.view_as(t) if recorded else t.detach().requires_grad_()
            for t in inputs
        ]
        outputs = function(*aliases)
    if isinstance(outputs, Tensor):
        outputs, grads = (outputs,), (grads,)
    pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    if not pairs:  # a gradient that is constant
        return [None] * len(aliases)
    wanted = [alias for alias in aliases if alias is not None and alias.requires_grad]
    differentiable, arrived = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(differentiable, wanted, arrived, create_graph=recorded, allow_unused=True))
    return [next(found) if alias is not None and alias.requires_grad else None for alias in aliases]
