"""The reduction plan, and the operations that apply it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.ops.registry import Implementation, Operation


class Plan(NamedTuple):
    """Which tokens survive a reduction, and where the others are merged. B images, L tokens, M survivors."""

    dest: Tensor
    """(B, L) int64: the output position of each token: that of its target if it is merged, -1 if it is dropped."""
    weight: Tensor
    """(B, L) float32: the weight of each token in the weighted mean at its output position."""
    keep: Tensor
    """(B, M) int64: the input positions of the survivors, in output order."""
    removed: Tensor
    """(B, L - M) int64: the input positions of the removed tokens."""
    offsets: Tensor | None = None
    """(B, M + 1) int64, if ``removed`` is sorted by destination: the tokens merged into survivor j are
    ``removed[offsets[j] : offsets[j + 1]]``, and those before ``offsets[0]`` are dropped."""
    residual: "Plan | None" = None
    """Separate plan for the residual stream, with the same survivors; ``None`` to apply this one to both streams. The
    metadata of the tokens always follows this plan."""
    metadata: "tuple[Tensor, Tensor, Tensor] | None" = None
    """The result of ``update_metadata`` for the tokens the plan was made for, if the decision has computed it."""
    grid: tuple[int, int] | None = None
    """(rows, columns) if the survivors form a full grid again, in their order."""

    def with_offsets(self) -> "Plan":
        """The same plan with ``removed`` sorted by destination, and ``offsets``."""
        if self.offsets is not None:
            return self
        target, order = self.dest.gather(1, self.removed).sort(dim=1, stable=True)
        survivors = torch.arange(self.keep.shape[1] + 1, device=self.dest.device).expand(self.dest.shape[0], -1)
        offsets = torch.searchsorted(target, survivors.contiguous())
        return self._replace(removed=self.removed.gather(1, order), offsets=offsets)


def make_plan(source: Tensor, into: Tensor, key: Tensor, mass: Tensor) -> Plan:
    """The plan that merges the source tokens into survivors, or drops them.

    Args:
        source: (B, r) positions of the tokens to remove, distinct within an image.
        into: (B, r) the position of each source's merge target, a survivor; -1 to drop the source.
        key: (B, L) floating point and finite; the survivors are sorted by it, ascending.
        mass: (B, L) the weights of the mean over merged tokens, ones for the plain mean. No gradient flows through
            them: a plan is a decision.
    """
    batch, length = key.shape
    keep = key.scatter(1, source, torch.inf).argsort(dim=1, stable=True)[:, : length - source.shape[1]]

    slots = torch.arange(keep.shape[1], device=key.device).expand(batch, -1)
    dest = torch.full((batch, length), -1, dtype=torch.int64, device=key.device).scatter(1, keep, slots)
    merged = torch.where(into < 0, -1, dest.gather(1, into.clamp(min=0)))
    dest = dest.scatter(1, source, merged)

    alive = dest.clamp(min=0)
    mass = mass.detach().to(torch.float32).masked_fill(dest < 0, 0)
    total = torch.zeros(keep.shape, dtype=torch.float32, device=key.device).scatter_add(1, alive, mass)
    return Plan(dest, mass / total.gather(1, alive), keep, source)


def apply_plan(
    x: Tensor, dest: Tensor, weight: Tensor, keep: Tensor, removed: Tensor, offsets: Tensor | None = None
) -> Tensor:
    """Gather the survivors and add the tokens merged into them.

    ``out[b, j] = Σ weight[b, i] · x[b, i]`` over the tokens i with ``dest[b, i] == j``.

    Args:
        x: (B, L, C).
        dest, weight, keep, removed, offsets: of a ``Plan``; ``dest`` of the token ``keep[b, j]`` is j.

    Returns:
        (B, M, C) in the dtype of ``x``, accumulated in float32 (float64 for float64). A survivor of weight 1 that
        absorbs no token is copied bit for bit. Differentiable in ``x`` and ``weight``.
    """
    return APPLY_PLAN(x, dest, weight, keep, removed, offsets)


def merge_tokens(plan: Plan, x: Tensor) -> tuple[Tensor, Plan]:
    """``apply_plan``, and the plan to apply to other tensors: sorted, if kernels read it, so that it is sorted once."""
    if APPLY_PLAN.pick(x, *plan[:5]).name == "triton":
        plan = plan.with_offsets()
    return apply_plan(x, *plan[:5]), plan


def apply_plan_reference(
    x: Tensor, dest: Tensor, weight: Tensor, keep: Tensor, removed: Tensor, offsets: Tensor | None = None
) -> Tensor:
    """Gather and scatter-add, plain PyTorch. Arguments and result as ``apply_plan``."""
    return merge_rows(x, weight, keep, removed, dest.gather(1, removed))


def merge_rows(x: Tensor, weight: Tensor, keep: Tensor, removed: Tensor, target: Tensor) -> Tensor:
    """``apply_plan``, given the output positions ``target`` (B, L - M) of the removed tokens."""
    channels = x.shape[2]
    wide = torch.promote_types(x.dtype, torch.float32)

    def rows(index: Tensor) -> Tensor:  # the weighted tokens at index (B, K) -> (B, K, C)
        token = x.gather(1, index[..., None].expand(-1, -1, channels)).to(wide)
        return token * weight.gather(1, index)[..., None].to(wide)

    # Dropped tokens add zero to position 0, so that all shapes are static.
    merged = rows(removed).masked_fill((target < 0)[..., None], 0)
    index = target.clamp(min=0)[..., None].expand(-1, -1, channels)
    return rows(keep).scatter_add(1, index, merged).to(x.dtype)


def _apply_triton(x: Tensor, *parts: Any) -> Tensor:
    from mtr_lab.ops.gpu import norm

    plan: Any = Plan(*parts).with_offsets()
    return norm.apply_plan(x, plan.weight, plan.keep, plan.removed, plan.offsets)


def _apply_cpu(*inputs: Any) -> Tensor:
    from mtr_lab.ops.cpu import norm

    return norm.apply_plan(*inputs)


APPLY_PLAN = Operation(
    "apply_plan",
    [
        Implementation("triton", _apply_triton, package="triton"),
        Implementation("cpu", _apply_cpu),
        Implementation("reference", apply_plan_reference),
    ],
    schema=("Tensor x, Tensor dest, Tensor weight, Tensor keep, Tensor removed, Tensor? offsets", "Tensor"),
    fake=lambda x, dest, weight, keep, removed, offsets: x.new_empty(x.shape[0], keep.shape[1], x.shape[2]),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, dest, weight, *_ = inputs
    ctx.save_for_backward(x if weight.requires_grad else None, dest, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, dest, weight = ctx.saved_tensors
    incoming = grad.gather(1, dest.clamp(min=0)[..., None].expand(-1, -1, grad.shape[2]))
    incoming = incoming.masked_fill((dest < 0)[..., None], 0)
    grad_weight = None if x is None else (incoming.to(weight.dtype) * x.to(weight.dtype)).sum(-1)
    return incoming * weight[..., None].to(grad.dtype), None, grad_weight, *(None,) * 4


APPLY_PLAN.operator.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.mtr_lab.apply_plan)
def apply_plan_flops(x_shape, dest_shape, weight_shape, keep_shape, removed_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """2 FLOPs per channel and removed token."""
    batch, _, channels = x_shape
    return 2 * batch * removed_shape[1] * channels


def follow(plan: Plan, source: Tensor) -> Tensor:
    """Where the token is after a plan that contains each original position.

    Args:
        source: (B, L0) int64, the token that contains each original position, -1 if it was dropped.

    Returns:
        (B, L0), the survivor that contains it, -1 if it is dropped.
    """
    return FOLLOW(plan.dest, plan.weight, source)


def follow_reference(dest: Tensor, weight: Tensor, source: Tensor) -> Tensor:
    """A gather in plain PyTorch. Result as ``follow``; the first arguments are a plan's."""
    return torch.where(source < 0, -1, dest.gather(1, source.clamp(min=0)))


def _follow_triton(dest: Tensor, weight: Tensor, source: Tensor) -> Tensor:
    from mtr_lab.ops.gpu import metadata

    return metadata.follow(dest, source)


FOLLOW = Operation(
    "follow",
    [
        Implementation("triton", _follow_triton, package="triton"),
        Implementation("reference", follow_reference),
    ],
    schema=("Tensor dest, Tensor weight, Tensor source", "Tensor"),
    fake=lambda dest, weight, source: source.new_empty(source.shape),
    main=1,
)


def update_metadata(plan: Plan, index: Tensor, size: Tensor, special: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The metadata of the tokens after a plan.

    Args:
        index: (B, L) int64, the original position of each token.
        size: (B, L) float32, the number of original tokens each token stands for.
        special: (B, S) int64, the positions of the special tokens.

    Returns:
        index (B, M), size (B, M), summed over merged tokens, and special (B, S) of the survivors.
    """
    if plan.metadata is not None:
        return plan.metadata
    return UPDATE_METADATA(index, size, special, plan.dest, plan.keep, plan.removed)


def update_metadata_reference(
    index: Tensor, size: Tensor, special: Tensor, dest: Tensor, keep: Tensor, removed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gathers and a scatter-add, plain PyTorch. Result as ``update_metadata``; the last arguments are a plan's."""
    none = torch.zeros_like(keep, dtype=size.dtype)
    summed = none.scatter_add(1, dest.clamp(min=0), size.masked_fill(dest < 0, 0))
    return index.gather(1, keep), summed, dest.gather(1, special)


def _update_metadata_triton(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from mtr_lab.ops.gpu import metadata

    return metadata.update_metadata(*inputs)


def _like_survivors(
    index: Tensor, size: Tensor, special: Tensor, dest: Tensor, keep: Tensor, removed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return index.new_empty(keep.shape), size.new_empty(keep.shape), special.new_empty(special.shape)


UPDATE_METADATA = Operation(
    "update_metadata",
    [
        Implementation("triton", _update_metadata_triton, package="triton"),
        Implementation("reference", update_metadata_reference),
    ],
    schema=(
        "Tensor index, Tensor size, Tensor special, Tensor dest, Tensor keep, Tensor removed",
        "(Tensor, Tensor, Tensor)",
    ),
    fake=_like_survivors,
    main=1,
)
