"""Residual addition and normalisation with gradients, on a GPU: one kernel forwards, one backwards."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtr_lab.ops.vjp import vjp


class NormAdd(torch.autograd.Function):
    """``NormAdd.apply(hidden, residual, weight, bias, eps, composed)`` -> normed and total, both (B, L, C).

    The arguments are those of ``layer_norm_add``; a ``bias`` of ``None`` is for RMSNorm. ``composed(hidden, residual,
    weight, bias)`` returns the same in differentiable operations; second derivatives are computed through it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        composed: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        from mtr_lab.ops.gpu import norm

        normed, total = norm.norm_add(hidden, residual, weight, bias, eps, *(None,) * 7)
        ctx.eps, ctx.composed = eps, composed
        ctx.save_for_backward(hidden, residual, total, weight, bias)
        return normed, total

    @staticmethod
    def backward(ctx: Any, normed_grad: Tensor, total_grad: Tensor) -> tuple[Any, ...]:
        from mtr_lab.ops.gpu import norm_backward

        hidden, residual, total, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *vjp(ctx.composed, (hidden, residual, weight, bias), (normed_grad, total_grad)), None, None
        grads = norm_backward.norm_add_backward(
            total, weight, bias, ctx.eps, normed_grad, total_grad, residual=residual is not None
        )
        return *grads, None, None
