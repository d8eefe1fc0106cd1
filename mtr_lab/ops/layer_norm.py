"""Layer normalisation of tokens, for norms without a residual stream."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.ops.registry import Implementation, Operation


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Normalise each token to mean 0 and variance 1.

    Args:
        x: (B, L, E).
        weight: (E,).
        bias: (E,); ``None`` for none.

    Returns:
        (B, L, E) in the dtype of ``x``.
    """
    return LAYER_NORM(x, weight, bias, eps)


def _library(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _triton(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    from mtr_lab.ops.gpu.add_paths import add_paths

    return add_paths(x.contiguous()[None], None, weight, bias, eps)


def _unfit(*inputs: Any) -> str:
    differentiable = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)
    return "has no gradient of a norm without a residual stream" if differentiable else ""


LAYER_NORM = Operation(
    "layer_norm",
    [
        Implementation("triton", _triton, unfit=_unfit, package="triton"),
        Implementation("portable", _library, composed=True),
    ],
    schema=("Tensor x, Tensor weight, Tensor? bias, float eps", "Tensor"),
    fake=lambda x, *inputs: torch.empty_like(x, memory_format=torch.contiguous_format),
    strict=False,
)


@register_flop_formula(torch.ops.mtr_lab.layer_norm)
def layer_norm_flops(*args: Any, **kwargs: Any) -> int:
    """None, as for the norms of PyTorch."""
    return 0
