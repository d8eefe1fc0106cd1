"""The decision of a reduction: scores, nearest tokens, and the asymmetric decision as one operation."""

from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.ops.decision_inputs import DecisionInputs, stream_of
from mtr_lab.ops.plan import Plan, make_plan, update_metadata_reference
from mtr_lab.ops.registry import Implementation, Operation, operator


def nearest(features: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The target of the highest cosine similarity for each source, the first of equals. It has no gradient.

    Args:
        features: (B, L, C).
        source, target: positions (B, A) and (B, T).

    Returns:
        into: the position of each source's target, (B, A).
        similarity: their cosine, (B, A).
    """
    return NEAREST(features.detach(), source, target)


def nearest_reference(features: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The product of all sources and targets, plain PyTorch. Arguments and result as ``nearest``."""

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
    """2 FLOPs per channel and similarity."""
    return 2 * source_shape[0] * source_shape[1] * target_shape[1] * features_shape[2]


def importance(terms: Tensor, scale: float) -> Tensor:
    """The score of each token, (B, L) float32, higher is more important: ``Σ_k terms[:, k] / scale``.

    Terms are (B, K, L). NaN becomes 0, and infinity the largest finite number.
    """
    # K is small: additions are faster than a reduction.
    return torch.nan_to_num(reduce(torch.add, terms.unbind(1)) / scale).float()


def asymmetric_plan(inputs: DecisionInputs) -> Plan:
    """Merge the least important tokens into the most similar of the next least important; the order is kept.

    A decision has no gradient.
    """
    return ASYMMETRIC_PLAN(*(t.detach() if isinstance(t, Tensor) else t for t in inputs))


def asymmetric_plan_reference(inputs: DecisionInputs) -> Plan:
    """Rank, match and merge, one operation after the other."""
    terms, scale, index, size, special, hidden, residual, remove, targets, by_size = inputs
    score = torch.nan_to_num(importance(terms, scale))  # float64 scores may overflow to infinity in float32
    rank = score.scatter(1, special, torch.inf).argsort(dim=1, stable=True)  # special tokens come last
    source, target = rank[:, :remove], rank[:, remove : remove + targets]
    features = stream_of(hidden, residual)
    into = torch.full_like(source, -1) if features is None else nearest(features, source, target)[0]
    return make_plan(source, into, index.double(), size if by_size else torch.ones_like(size))


def _plan_of_kernels(*inputs: Any, implementation: str) -> Plan:
    dest, weight, keep, removed, offsets, index, size, special = _asymmetric_plan(*inputs, implementation)
    return Plan(dest, weight, keep, removed, offsets, metadata=(index, size, special))


def _unfit(*arguments: Any) -> str:
    from mtr_lab.ops.gpu import decision as kernels

    inputs = DecisionInputs(*arguments)
    if any(t is not None and t.dtype == torch.float64 for t in (inputs.hidden, inputs.residual)):
        return "compares tokens in float32"
    fits = inputs.index.shape[1] <= kernels.MAX_LENGTH and inputs.remove <= kernels.MAX_REMOVED
    return "" if fits else f"removes at most {kernels.MAX_REMOVED} of {kernels.MAX_LENGTH} tokens"


def _unfit_for_cpu(*arguments: Any) -> str:
    inputs = DecisionInputs(*arguments)
    streams = [t for t in (inputs.hidden, inputs.residual) if t is not None]
    if not streams or any(t.dtype == torch.float64 for t in streams) or torch.compiler.is_compiling():
        return "merges tokens compared in float32, and not in a compiled graph"
    return ""


ASYMMETRIC_PLAN = Operation(
    "asymmetric_plan",
    [
        Implementation("triton", partial(_plan_of_kernels, implementation="triton"), unfit=_unfit, package="triton"),
        Implementation("cpu", partial(_plan_of_kernels, implementation="cpu"), unfit=_unfit_for_cpu),
        Implementation("reference", lambda *inputs: asymmetric_plan_reference(DecisionInputs(*inputs))),
    ],
)


def _run_kernels(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, implementation = arguments
    if implementation == "cpu":
        from mtr_lab.ops.cpu import decision

        return decision.asymmetric_plan(DecisionInputs(*inputs))
    from mtr_lab.ops.gpu import decision as kernels

    return kernels.asymmetric_plan(DecisionInputs(*inputs))


def _in_plain_pytorch(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = DecisionInputs(*arguments[:-1])
    plan = asymmetric_plan_reference(inputs).with_offsets()
    metadata = update_metadata_reference(inputs.index, inputs.size, inputs.special, plan.dest, plan.keep, plan.removed)
    return plan.dest, plan.weight, plan.keep, plan.removed, plan.offsets, *metadata  # type: ignore[return-value]


def _like_result(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = DecisionInputs(*arguments[:-1])
    size, special, remove = inputs.size, inputs.special, inputs.remove
    images, length = size.shape
    kept = length - remove
    lengths = length, kept, remove, kept + 1, kept
    dest, keep, removed, offsets, new_index = (special.new_empty(images, n) for n in lengths)
    weight = size.new_empty(size.shape, dtype=torch.float32)
    return (
        dest,
        weight,
        keep,
        removed,
        offsets,
        new_index,
        size.new_empty(images, kept),
        special.new_empty(special.shape),
    )


_asymmetric_plan = operator(
    "asymmetric_plan",
    "(Tensor terms, float scale, Tensor index, Tensor size, Tensor special, Tensor? hidden, Tensor? residual, "
    f"int remove, int targets, bool by_size, str implementation) -> ({', '.join(['Tensor'] * 8)})",
    run=_run_kernels,
    fake=_like_result,
    decomposition=_in_plain_pytorch,
)


@register_flop_formula(torch.ops.mtr_lab.asymmetric_plan)
def asymmetric_plan_flops(  # type: ignore[no-untyped-def]
    terms_shape, scale, index_shape, size_shape, special_shape, hidden_shape, residual_shape, remove, targets, *args,
    out_shape=None, **kwargs
) -> int:  # fmt: skip
    """2 FLOPs per channel and similarity."""
    compared = hidden_shape or residual_shape
    return 2 * compared[0] * remove * targets * compared[2] if compared else 0
