"""Matching among neighbours of the grid, and the decision that merges every second token into a neighbour."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.ops.decision_inputs import NeighbourInputs, stream_of
from mtr_lab.ops.plan import Plan, make_plan, update_metadata_reference
from mtr_lab.ops.registry import Implementation, Operation


def neighbours(axes: Sequence[int]) -> int:
    """The most neighbours of a place on a grid: those at most one row and column away, in the same frame."""
    return int(3 ** min(len(axes), 2)) - 1


def nearest_neighbour(
    features: Tensor, index: Tensor, special: Tensor, source: Tensor, target: Tensor, axes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The neighbour of the highest cosine similarity for each source, the first of equals. It has no gradient.

    Neighbours are the targets that were at most one row and column away in the same frame before any reduction. A
    source without one gets the target nearest to it in the unreduced sequence, the first of equals, and the similarity
    -∞.

    Args:
        features: (B, L, C).
        index: (B, L) int64, the original position of each token.
        special: (B, S) int64, the positions of the special tokens, which stand between places of the grid.
        source, target: positions (B, A) and (B, T).
        axes: the size of the grid along each axis, ([[frames,] rows,] columns); its places follow each other in the
            unreduced sequence, those of the last axis fastest.

    Returns:
        into: the position of each source's target, (B, A).
        similarity: their cosine, (B, A).
    """
    return NEAREST_NEIGHBOUR(features.detach(), index, special, source, target, list(axes))


def nearest_neighbour_reference(
    features: Tensor, index: Tensor, special: Tensor, source: Tensor, target: Tensor, axes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """All pairs of sources and targets, plain PyTorch. Arguments and result as ``nearest_neighbour``."""

    def unit_rows(positions: Tensor) -> Tensor:
        rows = features.gather(1, positions[..., None].expand(-1, -1, features.shape[-1]))
        return F.normalize(rows.float(), dim=-1)

    special_before = (index.gather(1, special)[:, None] < index[..., None]).sum(-1)
    place = index - special_before  # on the grid, without special tokens
    first, second = place.gather(1, source)[..., None], place.gather(1, target)[:, None]
    distance = (first - second).abs()  # (B, A, T)
    far = torch.zeros_like(distance, dtype=torch.bool)
    for size in reversed(axes[-2:]):
        far = far | ((first % size - second % size).abs() > 1)
        first, second = first // size, second // size
    if len(axes) > 2:
        far = far | (first != second)  # frames
    similarity = torch.bmm(unit_rows(source), unit_rows(target).transpose(1, 2)).masked_fill(far, -torch.inf)
    best, choice = similarity.max(dim=-1)
    choice = torch.where(best == -torch.inf, distance.argmin(dim=-1), choice)
    return target.gather(1, choice), best


NEAREST_NEIGHBOUR = Operation(
    "nearest_neighbour",
    [Implementation("reference", nearest_neighbour_reference)],
    schema=(
        "Tensor features, Tensor index, Tensor special, Tensor source, Tensor target, int[] axes",
        "(Tensor, Tensor)",
    ),
    fake=lambda features, index, special, source, target, axes: (
        source.new_empty(source.shape),
        features.new_empty(source.shape, dtype=torch.float32),
    ),
)


@register_flop_formula(torch.ops.mtr_lab.nearest_neighbour)
def nearest_neighbour_flops(  # type: ignore[no-untyped-def]
    features_shape, index_shape, special_shape, source_shape, target_shape, axes, *args, out_shape=None, **kwargs
) -> int:
    """2 FLOPs per channel and similarity, for as many neighbours as a place can have."""
    return 2 * source_shape[0] * source_shape[1] * min(target_shape[1], neighbours(axes)) * features_shape[2]


def neighbour_plan(inputs: NeighbourInputs) -> Plan:
    """Merge tokens of even turns in the sequence into neighbours of odd turns; the order is kept.

    Special tokens take no turn. Of the sources, those go whose weighted distance ``weight · (1 - similarity)`` from
    their nearest neighbour is least, of equals the earlier; those without a neighbour go last. A decision has no
    gradient.
    """
    tensors = (t.detach() if isinstance(t, Tensor) else t for t in inputs)
    dest, weight, keep, removed, offsets, *metadata = NEIGHBOUR_PLAN(*tensors)
    return Plan(dest, weight, keep, removed, offsets, metadata=tuple(metadata))


def weighted_distance(similarity: Tensor, weight: Tensor | None, *, cosine: bool = True) -> Tensor:
    """``weight · (1 - similarity)``; without weight -similarity, of the same order, but exact. ∞ for similarity -∞.

    ``cosine``: whether equal tokens have the similarity 1, else 0.
    """
    if weight is None:
        return -similarity
    distance = weight * (1 - similarity if cosine else -similarity)
    return torch.where(similarity == -torch.inf, torch.inf, distance)


def neighbour_plan_reference(*arguments: Any) -> tuple[Tensor, ...]:
    """Match, rank and merge, one operation after the other."""
    index, size, special, weight, hidden, residual, remove, by_size, axes = arguments
    length = index.shape[1]
    is_special = torch.zeros_like(index, dtype=torch.uint8).scatter(1, special, 1)
    tokens = is_special.argsort(dim=1, stable=True)[:, : length - special.shape[1]]
    source, target = tokens[:, ::2], tokens[:, 1::2]
    features = stream_of(hidden, residual)
    assert features is not None
    into, similarity = nearest_neighbour_reference(features, index, special, source, target, axes)
    cost = weighted_distance(similarity, None if weight is None else weight.gather(1, source))
    least = cost.argsort(dim=1, stable=True)[:, :remove]
    mass = size if by_size else torch.ones_like(size)
    plan = make_plan(source.gather(1, least), into.gather(1, least), index.double(), mass).with_offsets()
    metadata = update_metadata_reference(index, size, special, plan.dest, plan.keep, plan.removed)
    return tuple(t.contiguous() for t in (*plan[:5], *metadata) if isinstance(t, Tensor))


def _kernels(*arguments: Any) -> tuple[Tensor, ...]:
    from mtr_lab.ops.gpu import neighbours as kernels

    return kernels.neighbour_plan(NeighbourInputs(*arguments))


def _unfit_for_kernels(*arguments: Any) -> str:
    from mtr_lab.ops.gpu import decision as kernels

    inputs = NeighbourInputs(*arguments)
    if any(t is not None and t.dtype == torch.float64 for t in (inputs.hidden, inputs.residual)):
        return "compares tokens in float32"
    fits = inputs.index.shape[1] <= kernels.MAX_LENGTH and inputs.remove <= kernels.MAX_REMOVED
    return "" if fits else f"removes at most {kernels.MAX_REMOVED} of {kernels.MAX_LENGTH} tokens"


def _neighbour_plan_cpu(*arguments: Any) -> tuple[Tensor, ...]:
    from mtr_lab.ops.cpu import decision

    return decision.neighbour_plan(NeighbourInputs(*arguments))


def _unfit_for_cpu(*arguments: Any) -> str:
    inputs = NeighbourInputs(*arguments)
    streams = (inputs.hidden, inputs.residual)
    return "compares tokens in float32" if any(t is not None and t.dtype == torch.float64 for t in streams) else ""


def _like_result(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = NeighbourInputs(*arguments)
    index, size, special, remove = inputs.index, inputs.size, inputs.special, inputs.remove
    images, length = index.shape
    kept = length - remove
    dest, keep, removed, offsets, survivors = (
        index.new_empty(images, n) for n in (length, kept, remove, kept + 1, kept)
    )
    sizes = size.new_empty(images, kept)
    return (
        dest,
        size.new_empty(images, length),
        keep,
        removed,
        offsets,
        survivors,
        sizes,
        special.new_empty(special.shape),
    )


NEIGHBOUR_PLAN = Operation(
    "neighbour_plan",
    [
        Implementation("triton", _kernels, unfit=_unfit_for_kernels, package="triton"),
        Implementation("cpu", _neighbour_plan_cpu, unfit=_unfit_for_cpu),
        Implementation("reference", neighbour_plan_reference),
    ],
    schema=(
        "Tensor index, Tensor size, Tensor special, Tensor? weight, Tensor? hidden, Tensor? residual, int remove, "
        "bool by_size, int[] axes",
        f"({', '.join(['Tensor'] * 8)})",
    ),
    fake=_like_result,
    main=1,
    strict=False,
)


@register_flop_formula(torch.ops.mtr_lab.neighbour_plan)
def neighbour_plan_flops(  # type: ignore[no-untyped-def]
    index_shape, size_shape, special_shape, weight_shape, hidden_shape, residual_shape, remove, by_size, axes, *args,
    out_shape=None, **kwargs
) -> int:  # fmt: skip
    """2 FLOPs per channel and similarity, for as many neighbours as a place can have."""
    batch, _, channels = hidden_shape or residual_shape
    tokens = index_shape[1] - special_shape[1]
    return 2 * batch * (tokens - tokens // 2) * min(tokens // 2, neighbours(axes)) * channels
