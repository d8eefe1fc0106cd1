"""Matrix products with the weights of a linear layer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.ops import onednn
from mtr_lab.ops.registry import Implementation, Operation


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: (..., K), (N, K) and (N,) -> (..., N). Differentiable."""
    return LINEAR(x, weight, bias)


def _unfit(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return "does not compute gradients of matrix products"
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return "does not multiply matrices in graphs or under autocast"
    return "" if weight.dtype == x.dtype else "multiplies matrices of one dtype only"


LINEAR = Operation(
    "linear",
    [Implementation("cpu", onednn.linear, unfit=_unfit), Implementation("reference", F.linear)],
    strict=False,
)


if onednn.has_onednn():

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def linear_flops(x_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        """2 FLOPs per multiply-accumulate."""
        return 2 * int(torch.Size(x_shape).numel()) * int(weight_shape[0])
