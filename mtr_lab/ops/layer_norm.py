"""Layer normalisation of tokens, for norms without a residual stream."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.errors import UserError
from mtr_lab.ops.registry import Implementation, Operation, autocasts, lacks_gradient
from mtr_lab.ops.shapes import check_shapes


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Normalise each token to mean 0 and variance 1.

    Differentiable, by the norm of PyTorch.

    Args:
        x: (B, L, E).
        weight: (E,), multiplies the normalised channels.
        bias: (E,), added to them; ``None`` for none.
        eps: added to the variance, so that equal channels are not divided by 0.

    Returns:
        (B, L, E) in the dtype of ``x``; in float32 under autocast on a GPU, as of ``F.layer_norm``.

    Raises:
        UserError: shapes that do not match.

    Source: Ba et al., "Layer Normalization", arXiv 1607.06450.
    """
    if x.ndim != 3:
        raise UserError(f"layer_norm: expected x (B, L, E), got {tuple(x.shape)}: flatten the axes of its tokens.")
    expected = {"weight": (weight, x.shape[2:]), "bias": (bias, x.shape[2:])}
    check_shapes("layer_norm", f"x of shape {tuple(x.shape)}", expected)
    return LAYER_NORM(x, weight, bias, eps)


def _library(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _triton(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    from mtr_lab.ops.gpu.add_paths import add_paths

    return add_paths(x.contiguous()[None], None, weight, bias, eps)


def _unfit(*inputs: Any) -> str:
    if autocasts():
        return "normalises no tokens under autocast"
    return lacks_gradient("a norm without a residual stream", *inputs)


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
