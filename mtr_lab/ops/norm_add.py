"""Residual addition and normalisation between two blocks: RMSNorm without a bias, LayerNorm with one."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.ops.norm_training import NormAdd
from mtr_lab.ops.plan import Plan, apply_plan, merge_rows
from mtr_lab.ops.registry import Implementation, Operation, operator


def rms_norm_add(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-5, *, plan: Plan | None = None
) -> tuple[Tensor, Tensor]:
    """Add ``hidden`` to the residual stream and normalise the sum.

    Args:
        hidden: (B, L, C), the previous block's output; (B, M, C) if the plan has been applied to it before.
        residual: (B, L, C) in float32 (or float64), or ``None`` before the first block.
        weight: (C,).
        plan: a reduction that is applied to both streams first; M of the L tokens survive.

    Returns:
        normed: (B, M, C) in the dtype of ``hidden``.
        residual: (B, M, C), the sum, kept in float32 whatever the model's dtype (float64 for float64).
    """
    return NORM_ADD(hidden, residual, weight, None, eps, plan)


def layer_norm_add(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """Add ``hidden`` to the residual stream and normalise the sum to mean 0 and variance 1.

    Arguments and result as of ``rms_norm_add``; ``bias`` is (C,).
    """
    return NORM_ADD(hidden, residual, weight, bias, eps, plan)


def _composed(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, plan: Plan | None
) -> tuple[Tensor, Tensor]:
    """Apply the plan, then add and normalise."""
    if plan is not None:
        hidden, residual = reduce_streams(plan, hidden, residual)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    residual = hidden.to(wide) if residual is None else hidden.to(wide) + residual
    if bias is None:
        normed = F.rms_norm(residual, weight.shape, weight.to(wide), eps)
    else:
        normed = F.layer_norm(residual, weight.shape, weight.to(wide), bias.to(wide), eps)
    return normed.to(hidden.dtype), residual


def _fused(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, plan: Plan | None
) -> tuple[Tensor, Tensor]:
    """One kernel for plan, addition and normalisation. With gradients, another one applies the plan."""
    if _needs_gradients(hidden, residual, weight, bias):
        if plan is not None:
            hidden, residual = reduce_streams(plan, hidden, residual)
        return NormAdd.apply(hidden, residual, weight, bias, eps, partial(_composed, eps=eps, plan=None))
    return _by_kernels(hidden, residual, weight, bias, eps, plan, implementation="triton")


def _by_kernels(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    plan: Plan | None,
    *,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    if plan is None:
        return _norm_add(hidden, residual, weight, bias, eps, *(None,) * 7, implementation)
    own = plan.with_offsets()
    other = own if plan.residual is None else plan.residual.with_offsets()
    lists = (t for part in (own, other) for t in (part.weight, part.removed, part.offsets))
    return _norm_add(hidden, residual, weight, bias, eps, plan.keep, *lists, implementation)


def _unfit_for_cpu(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, plan: Plan | None
) -> str:
    if torch.compiler.is_compiling() or _needs_gradients(hidden, residual, weight, bias):
        return "has no gradient of the fused norm, and none in a compiled graph"
    return "" if hidden.ndim == 3 else "normalises streams (B, L, C)"


def _unfit(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, plan: Plan | None
) -> str:
    traced = torch.compiler.is_compiling() and _needs_gradients(hidden, residual, weight, bias)
    return "has no gradient of the fused norm in a compiled graph" if traced else ""


def _needs_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


NORM_ADD = Operation(
    "norm_add",
    [
        Implementation("triton", _fused, unfit=_unfit, package="triton"),
        Implementation("cpu", partial(_by_kernels, implementation="cpu"), unfit=_unfit_for_cpu, more=(torch.bfloat16,)),
        Implementation("reference", _composed),
    ],
)


def reduce_streams(plan: Plan, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Apply a plan to both streams, (B, L, C) -> (B, M, C) each. ``hidden`` may be of M tokens already."""
    if residual is not None:
        residual = apply_plan(residual, *(plan.residual or plan)[:5])
    return hidden if _is_reduced(hidden.shape, plan.keep.shape) else apply_plan(hidden, *plan[:5]), residual


def _is_reduced(hidden: Sequence[int], keep: Sequence[int]) -> bool:
    """Whether ``hidden`` (B, L or M, C) has the M tokens of ``keep`` (B, M): a plan removes one at least."""
    return hidden[1] == keep[1]


def _run_kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, implementation = arguments
    if implementation == "cpu":
        from mtr_lab.ops.cpu.norm import norm_add

        return norm_add(*inputs)
    from mtr_lab.ops.gpu import norm

    return norm.norm_add(*inputs)


def _in_plain_pytorch(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    keep: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """The kernel's function; first of the other arguments are weight, removed and offsets of each stream's plan."""
    *lists, _ = arguments
    if keep is not None:
        hidden = hidden if _is_reduced(hidden.shape, keep.shape) else _merge_lists(hidden, keep, *lists[:3])
        residual = None if residual is None else _merge_lists(residual, keep, *lists[3:])
    return _composed(hidden, residual, weight, bias, eps, None)


def _merge_lists(x: Tensor, keep: Tensor, weight: Tensor, removed: Tensor, offsets: Tensor) -> Tensor:
    """``apply_plan`` of a plan with ``offsets``."""
    place = torch.arange(removed.shape[1], device=removed.device).expand(removed.shape)
    target = torch.searchsorted(offsets, place.contiguous(), right=True) - 1
    return merge_rows(x, weight, keep, removed, target)


def _like_result(
    hidden: Tensor, residual: Any, weight: Tensor, bias: Any, eps: float, keep: Any, *lists: Any
) -> tuple[Any, Any]:
    shape = (hidden.shape[0], hidden.shape[1] if keep is None else keep.shape[1], hidden.shape[2])
    return hidden.new_empty(shape), hidden.new_empty(shape, dtype=torch.float32)


_norm_add = operator(
    "norm_add",
    "(Tensor hidden, Tensor? residual, Tensor weight, Tensor? bias, float eps, Tensor? keep, Tensor? share, "
    "Tensor? removed, Tensor? offsets, Tensor? residual_share, Tensor? residual_removed, Tensor? residual_offsets, "
    "str implementation) -> (Tensor, Tensor)",
    run=_run_kernel,
    fake=_like_result,
    decomposition=_in_plain_pytorch,
)


@register_flop_formula(torch.ops.mtr_lab.norm_add)
def norm_add_flops(  # type: ignore[no-untyped-def]
    hidden_shape, residual_shape, weight_shape, bias_shape, eps, keep_shape, share_shape, removed_shape, *args, **kwargs
) -> int:
    """The FLOPs of the plan alone: 2 for every channel of every removed token, in each stream that it is applied to."""
    if not removed_shape:
        return 0
    streams = (residual_shape is not None) + (not _is_reduced(hidden_shape, keep_shape))
    return 2 * streams * removed_shape[0] * removed_shape[1] * hidden_shape[2]
