"""Deciding a reduction: which tokens are alike, and the asymmetric decision as one operation."""

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.ops.plan import Plan, carry_plan_reference, make_plan
from mtr_lab.ops.registry import Implementation, Operation, operator


def nearest(features: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar target of each source by cosine similarity, the first of equals. It has no gradient.

    Args:
        features: (B, L, C).
        source, target: positions (B, A) and (B, T).

    Returns:
        the target of each source, a position (B, A), and their similarity (B, A).
    """
    return NEAREST(features.detach(), source, target)


def nearest_reference(features: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """One product of all sources and targets, plain PyTorch."""

    def unit_rows(index: Tensor) -> Tensor:
        rows = features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))
        return F.normalize(rows.float(), dim=-1)

    similarity, best = torch.bmm(unit_rows(source), unit_rows(target).transpose(1, 2)).max(dim=-1)  # of (B, A, T)
    return target.gather(1, best), similarity


NEAREST = Operation(
    "nearest",
    [Implementation("reference", nearest_reference)],
    schema=("Tensor features, Tensor source, Tensor target", "(Tensor, Tensor)"),
    fake=lambda features, source, target: (
        source.new_empty(source.shape),
        features.new_empty(source.shape, dtype=torch.float32),
    ),
)


@register_flop_formula(torch.ops.mtr_lab.nearest)
def nearest_flops(features_shape, source_shape, target_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """2 a multiply-accumulate of the similarities."""
    return 2 * source_shape[0] * source_shape[1] * target_shape[1] * features_shape[2]


def importance(terms: Tensor, scale: float) -> Tensor:
    """The score of each token, (B, L) float32, higher is more important: terms (B, K, L) summed, over ``scale``.

    0 if that is not a number, the largest one if it is infinite.
    """
    # By additions instead of a reduction over so few.
    return torch.nan_to_num(reduce(torch.add, terms.unbind(1)) / scale).float()


def asymmetric_plan(
    terms: Tensor,
    scale: float,
    index: Tensor,
    size: Tensor,
    special: Tensor,
    hidden: Tensor | None,
    residual: Tensor | None,
    removed: int,
    targets: int,
    *,
    by_size: bool,
) -> Plan:
    """Merge the least important tokens into the most similar of the next least important; the order stays as it is.

    A decision has no gradient.

    Args:
        terms, scale: as in ``importance``; of equally important tokens the earlier goes first.
        index, size, special: as ``carry_plan``; special tokens neither go nor take others in.
        hidden, residual: (B, L, C); tokens are compared by the cosine of the sum of those given. With neither, tokens
            are dropped.
        removed: how many tokens go.
        targets: how many may take them in.
        by_size: tokens that become one are averaged with their sizes as weights, else with equal ones.

    Returns:
        The plan.
    """
    hidden, residual = (None if t is None else t.detach() for t in (hidden, residual))
    return ASYMMETRIC_PLAN(terms.detach(), scale, index, size, special, hidden, residual, removed, targets, by_size)


def asymmetric_plan_reference(
    terms: Tensor,
    scale: float,
    index: Tensor,
    size: Tensor,
    special: Tensor,
    hidden: Tensor | None,
    residual: Tensor | None,
    removed: int,
    targets: int,
    by_size: bool,
) -> Plan:
    """Rank, match and merge, one operation after the other."""
    score = torch.nan_to_num(importance(terms, scale))  # a large score in float64 is infinite in float32
    rank = score.scatter(1, special, torch.inf).argsort(dim=1, stable=True)  # special tokens come last
    source, target = rank[:, :removed], rank[:, removed : removed + targets]
    features = _features(hidden, residual)
    into = torch.full_like(source, -1) if features is None else nearest(features, source, target)[0]
    return make_plan(source, into, index.double(), size if by_size else torch.ones_like(size))


def _features(hidden: Tensor | None, residual: Tensor | None) -> Tensor | None:
    """What tokens are compared by: the sum of the streams given, in float32 (float64 for float64)."""
    if hidden is None or residual is None:
        return residual if hidden is None else hidden
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32)) + residual


def _decide_in_kernels(*inputs: Any) -> Plan:
    dest, weight, keep, gone, start, *known = _asymmetric_plan(*inputs)
    return Plan(dest, weight, keep, gone, start, known=(known[0], known[1], known[2]))


def _unfit(terms: Tensor, scale: float, index: Tensor, *inputs: Any) -> str:
    from mtr_lab.ops.gpu import decision as kernels

    hidden, residual, removed = inputs[2:5]
    if any(t is not None and t.dtype == torch.float64 for t in (hidden, residual)):
        return "compares tokens in float32"
    fits = index.shape[1] <= kernels.MAX_LENGTH and removed <= kernels.MAX_REMOVED
    return "" if fits else f"removes at most {kernels.MAX_REMOVED} of {kernels.MAX_LENGTH} tokens"


ASYMMETRIC_PLAN = Operation(
    "asymmetric_plan",
    [
        Implementation("triton", _decide_in_kernels, unfit=_unfit, package="triton"),
        Implementation("reference", asymmetric_plan_reference),
    ],
)


def _run_kernels(*inputs: Any) -> tuple[Tensor, ...]:
    from mtr_lab.ops.gpu import decision as kernels

    return kernels.asymmetric_plan(*inputs)


def _in_plain_pytorch(*inputs: Any) -> tuple[Tensor, ...]:
    plan = asymmetric_plan_reference(*inputs).listed()
    index, size, special = inputs[2:5]
    known = carry_plan_reference(index, size, special, plan.dest, plan.keep, plan.gone)
    return plan.dest, plan.weight, plan.keep, plan.gone, plan.start, *known  # type: ignore[return-value]


def _like_result(  # type: ignore[no-untyped-def]
    terms, scale, index, size, special, hidden, residual, removed, targets, by_size
) -> tuple[Tensor, ...]:
    images, length = size.shape
    kept = length - removed
    dest, keep, gone, start, new_index = (special.new_empty(images, n) for n in (length, kept, removed, kept + 1, kept))
    weight = size.new_empty(size.shape, dtype=torch.float32)
    return dest, weight, keep, gone, start, new_index, size.new_empty(images, kept), special.new_empty(special.shape)


_asymmetric_plan = operator(
    "asymmetric_plan",
    "(Tensor terms, float scale, Tensor index, Tensor size, Tensor special, Tensor? hidden, Tensor? residual, "
    f"int removed, int targets, bool by_size) -> ({', '.join(['Tensor'] * 8)})",
    run=_run_kernels,
    fake=_like_result,
    decomposition=_in_plain_pytorch,
)


@register_flop_formula(torch.ops.mtr_lab.asymmetric_plan)
def asymmetric_plan_flops(  # type: ignore[no-untyped-def]
    terms_shape, scale, index_shape, size_shape, special_shape, hidden_shape, residual_shape, removed, targets, *args,
    out_shape=None, **kwargs
) -> int:  # fmt: skip
    """2 a multiply-accumulate of the similarities."""
    compared = hidden_shape or residual_shape
    return 2 * compared[0] * removed * targets * compared[2] if compared else 0
