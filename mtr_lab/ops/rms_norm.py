"""Residual addition and RMS normalisation, the step between two blocks."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.ops import backend
from mtr_lab.ops.plan import Plan, apply_plan


def rms_norm_add(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-5, *, plan: Plan | None = None
) -> tuple[Tensor, Tensor]:
    """Add ``hidden`` to the residual stream and normalise the sum.

    Args:
        hidden: (B, L, C), the previous block's output.
        residual: (B, L, C) in float32 (or float64), or ``None`` before the first block.
        weight: (C,).
        plan: a reduction to carry out on both streams first; M of the L tokens survive.

    Returns:
        normed: (B, M, C) in the dtype of ``hidden``.
        residual: (B, M, C), the sum, kept in float32 whatever the model's dtype (float64 for float64).
    """
    inputs = [t for t in (hidden, residual, weight) if t is not None]
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if backend.pick(hidden) == "triton" and not differentiable:
        if plan is None:
            return _rms_norm_add(hidden, residual, weight, eps, *(None,) * 7)
        own = plan.listed()
        other = own if plan.residual is None else plan.residual.listed()
        pieces = (p for part in (own, other) for p in (part.weight, part.gone, part.start))
        return _rms_norm_add(hidden, residual, weight, eps, plan.keep, *pieces)
    if plan is not None:
        hidden, residual = reduce_streams(plan, hidden, residual)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    residual = hidden.to(wide) if residual is None else hidden.to(wide) + residual
    return F.rms_norm(residual, weight.shape, weight.to(wide), eps).to(hidden.dtype), residual


def reduce_streams(plan: Plan, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Carry a plan out on both streams: (B, L, C) -> (B, M, C) each."""
    if residual is not None:
        residual = apply_plan(residual, *(plan.residual or plan)[:5])
    return apply_plan(hidden, *plan[:5]), residual


@torch.library.custom_op("mtr_lab::rms_norm_add", mutates_args=())
def _rms_norm_add(
    hidden: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    eps: float,
    keep: Optional[Tensor],
    share: Optional[Tensor],
    gone: Optional[Tensor],
    start: Optional[Tensor],
    residual_share: Optional[Tensor],
    residual_gone: Optional[Tensor],
    residual_start: Optional[Tensor],
) -> tuple[Tensor, Tensor]:
    from mtr_lab.ops.gpu import norm

    plan = keep, share, gone, start, residual_share, residual_gone, residual_start
    return norm.rms_norm_add(hidden, residual, weight, eps, *plan)


@_rms_norm_add.register_fake
def _(hidden, residual, weight, eps, keep, *others):  # type: ignore[no-untyped-def]
    shape = (hidden.shape[0], hidden.shape[1] if keep is None else keep.shape[1], hidden.shape[2])
    return hidden.new_empty(shape), hidden.new_empty(shape, dtype=torch.float32)


@register_flop_formula(torch.ops.mtr_lab.rms_norm_add)
def rms_norm_add_flops(  # type: ignore[no-untyped-def]
    hidden_shape, residual_shape, weight_shape, eps, keep_shape, share_shape, gone_shape, *args, **kwargs
) -> int:
    """Of the plan alone: 2 for every channel of every token that does not survive, in each stream."""
    streams = 1 if residual_shape is None else 2
    return 2 * streams * gone_shape[0] * gone_shape[1] * hidden_shape[2] if gone_shape else 0
