"""Gradients of a function in a backward pass, by running it again under autograd."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def vjp(function: Callable[..., Any], inputs: Sequence[Tensor | None], grads: Any) -> list[Tensor | None]:
    """The vector-Jacobian product of ``function(*inputs)`` with ``grads``, for use in a backward pass.

    It is differentiable if the backward pass is recorded (``create_graph=True``).

    Args:
        function: a differentiable function of the inputs that returns a tensor or a tuple of tensors.
        inputs: the saved tensors of a backward pass; ``None`` for an absent optional input.
        grads: the gradient of each output.

    Returns:
        The gradient of each input, ``None`` for inputs that require none.
    """
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        # One input may depend on another; views keep their gradients apart.
        aliases = [
            t if t is None or not t.requires_grad else t.view_as(t) if recorded else t.detach().requires_grad_()
            for t in inputs
        ]
        outputs = function(*aliases)
    if isinstance(outputs, Tensor):
        outputs, grads = (outputs,), (grads,)
    pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    if not pairs:  # no output depends on the inputs
        return [None] * len(aliases)
    wanted = [alias for alias in aliases if alias is not None and alias.requires_grad]
    differentiable, incoming = zip(*pairs, strict=True)
    gradients = iter(torch.autograd.grad(differentiable, wanted, incoming, create_graph=recorded, allow_unused=True))
    return [next(gradients) if alias is not None and alias.requires_grad else None for alias in aliases]
