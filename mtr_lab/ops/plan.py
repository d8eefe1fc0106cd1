"""A reduction plan, and the operations that decide one and carry it out."""

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.ops import backend


class Plan(NamedTuple):
    """Where every token of a batch goes. B images, L tokens in, M survivors out."""

    dest: Tensor
    """(B, L) int64, the output position each token goes to, -1 if it is dropped."""
    weight: Tensor
    """(B, L) float32, the share of each token in the token it becomes part of."""
    keep: Tensor
    """(B, M) int64, the survivors in output order: the input position of each."""
    gone: Tensor
    """(B, L - M) int64, the input positions of all others."""
    start: Tensor | None = None
    """(B, M + 1) int64 where ``gone`` is in the order of its tokens' destinations: those that become part of survivor j
    are ``gone[start[j] : start[j + 1]]``, those before ``start[0]`` are dropped."""
    residual: "Plan | None" = None
    """What happens to the residual stream, if that is something else; the survivors are the same. What is known of the
    tokens afterwards (their sizes, where each has gone) follows the block's output."""
    known: "tuple[Tensor, Tensor, Tensor] | None" = None
    """What ``carry_plan`` returns for the tokens the plan was decided on, where deciding found it on the way."""

    def listed(self) -> "Plan":
        """The same plan with ``start``."""
        if self.start is not None:
            return self
        target, order = self.dest.gather(1, self.gone).sort(dim=1, stable=True)
        survivors = torch.arange(self.keep.shape[1] + 1, device=self.dest.device).expand(len(self.dest), -1)
        start = torch.searchsorted(target, survivors.contiguous())
        return self._replace(gone=self.gone.gather(1, order), start=start)


def apply_plan(
    x: Tensor, dest: Tensor, weight: Tensor, keep: Tensor, gone: Tensor, start: Tensor | None = None
) -> Tensor:
    """Gather the survivors and add to each the tokens merged into it.

    ``out[b, j] = Σ weight[b, i] · x[b, i]`` over the tokens i with ``dest[b, i] == j``.

    Args:
        x: (B, L, C).
        dest, weight, keep, gone, start: of a ``Plan``. Every output position is the destination of the token ``keep``
            names for it.

    Returns:
        (B, M, C) in the dtype of ``x``, accumulated in float32 (float64 for float64); a survivor with weight 1 and
        nothing merged into it is copied bit for bit. Differentiable in ``x`` and ``weight``.
    """
    if backend.transformed():
        return apply_plan_reference(x, dest, weight, keep, gone)
    implementation = backend.pick(x)
    if implementation == "triton":
        *_, gone, start = Plan(dest, weight, keep, gone, start).listed()[:5]
    return _apply(x, dest, weight, keep, gone, start, implementation)


def apply_plan_reference(x: Tensor, dest: Tensor, weight: Tensor, keep: Tensor, gone: Tensor) -> Tensor:
    """Gather and scatter-add, plain PyTorch."""
    channels = x.shape[2]
    wide = torch.promote_types(x.dtype, torch.float32)

    def rows(index: Tensor) -> Tensor:  # the weighted tokens at index (B, K) -> (B, K, C)
        token = x.gather(1, index[..., None].expand(-1, -1, channels)).to(wide)
        return token * weight.gather(1, index)[..., None].to(wide)

    target = dest.gather(1, gone)
    # A dropped token adds zero to position 0, which keeps every shape static.
    merged = rows(gone).masked_fill_((target < 0)[..., None], 0)
    out = rows(keep)
    out.scatter_add_(1, target.clamp_(min=0)[..., None].expand(-1, -1, channels), merged)
    return out.to(x.dtype)


@torch.library.custom_op("mtr_lab::apply_plan", mutates_args=())
def _apply(
    x: Tensor,
    dest: Tensor,
    weight: Tensor,
    keep: Tensor,
    gone: Tensor,
    start: Optional[Tensor],
    implementation: str,
) -> Tensor:
    if start is not None and implementation == "triton":
        from mtr_lab.ops.gpu import norm

        return norm.apply_plan(x, weight, keep, gone, start)
    return apply_plan_reference(x, dest, weight, keep, gone)


@_apply.register_fake
def _(x, dest, weight, keep, gone, start, implementation):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], keep.shape[1], x.shape[2])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, dest, weight, *_ = inputs
    ctx.save_for_backward(x if weight.requires_grad else None, dest, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, dest, weight = ctx.saved_tensors
    arrived = grad.gather(1, dest.clamp(min=0)[..., None].expand(-1, -1, grad.shape[2]))
    arrived = arrived.masked_fill((dest < 0)[..., None], 0)
    grad_weight = None if x is None else (arrived.to(weight.dtype) * x.to(weight.dtype)).sum(-1)
    return arrived * weight[..., None].to(grad.dtype), None, grad_weight, *(None,) * 4


_apply.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.mtr_lab.apply_plan)
def apply_plan_flops(x_shape, dest_shape, weight_shape, keep_shape, gone_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """2 a multiply-accumulate: one for every channel of every token that does not survive."""
    batch, _, channels = x_shape
    return 2 * batch * gone_shape[1] * channels


def carry_plan(plan: Plan, index: Tensor, size: Tensor, special: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is known of the tokens after a plan.

    Args:
        index: (B, L) int64, the original position of each token.
        size: (B, L) float32, how many original tokens each token stands for.
        special: (B, S) int64, positions of the protected tokens.

    Returns:
        the same of the survivors: (B, M), (B, M), the sizes summed over what was merged, and (B, S).
    """
    if plan.known is not None:
        return plan.known
    return _carry(index, size, special, plan.dest, plan.keep, plan.gone, backend.pick(size))


@torch.library.custom_op("mtr_lab::carry_plan", mutates_args=())
def _carry(
    index: Tensor, size: Tensor, special: Tensor, dest: Tensor, keep: Tensor, gone: Tensor, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    if implementation == "triton":
        from mtr_lab.ops.gpu import carry

        return carry.carry(index, size, special, dest, keep, gone)
    summed = torch.zeros_like(keep, dtype=size.dtype)
    summed.scatter_add_(1, dest.clamp(min=0), size.masked_fill(dest < 0, 0))
    return index.gather(1, keep), summed, dest.gather(1, special)


@_carry.register_fake
def _(index, size, special, dest, keep, gone, implementation):  # type: ignore[no-untyped-def]
    return index.new_empty(keep.shape), size.new_empty(keep.shape), special.new_empty(special.shape)


def decides(tokens: Tensor, removed: int) -> bool:
    """Whether ``asymmetric_plan`` runs on these tokens, (B, L, C): on a GPU, for sequences of their length."""
    if backend.pick(tokens) != "triton":
        return False
    from mtr_lab.ops.gpu import plan

    return tokens.shape[1] <= plan.MAX_LENGTH and removed <= plan.MAX_REMOVED


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
    """Decide in kernels of its own what the parts of ``mtr_lab.reduction`` decide, where ``decides`` says it can.

    The least important tokens merge into the most similar of the next least important; the order stays as it is. Only
    for data ``decides`` is true of. A decision has no gradient.

    Args:
        terms: (B, K, L), of which each token's score is the sum over K, in float32, divided by ``scale``; 0 if that is
            not a number, the largest one if it is infinite. Higher is more important; of equals the earlier goes first.
        index, size, special: as ``carry_plan``; special tokens neither go nor take others in.
        hidden, residual: (B, L, C); tokens are compared by the cosine of the sum of those given. With neither, tokens
            are dropped.
        removed: how many tokens go.
        targets: how many may take them in.
        by_size: tokens that become one are averaged with their sizes as weights, else with equal ones.

    Returns:
        The plan with all that is known of its survivors.
    """
    hidden, residual = (None if t is None else t.detach() for t in (hidden, residual))
    dest, weight, keep, gone, start, *known = _asymmetric(
        terms.detach(), scale, index, size, special, hidden, residual, removed, targets, by_size
    )
    return Plan(dest, weight, keep, gone, start, known=(known[0], known[1], known[2]))


@torch.library.custom_op("mtr_lab::asymmetric_plan", mutates_args=())
def _asymmetric(
    terms: Tensor,
    scale: float,
    index: Tensor,
    size: Tensor,
    special: Tensor,
    hidden: Optional[Tensor],
    residual: Optional[Tensor],
    removed: int,
    targets: int,
    by_size: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from mtr_lab.ops.gpu import plan

    return plan.asymmetric_plan(terms, scale, index, size, special, hidden, residual, removed, targets, by_size)


@_asymmetric.register_fake
def _(terms, scale, index, size, special, hidden, residual, removed, targets, by_size):  # type: ignore[no-untyped-def]
    images, length = size.shape
    kept = length - removed
    dest, keep, gone, start, new_index = (special.new_empty(images, n) for n in (length, kept, removed, kept + 1, kept))
    weight = size.new_empty(size.shape, dtype=torch.float32)
    return dest, weight, keep, gone, start, new_index, size.new_empty(images, kept), special.new_empty(special.shape)


@register_flop_formula(torch.ops.mtr_lab.asymmetric_plan)
def asymmetric_plan_flops(  # type: ignore[no-untyped-def]
    terms_shape,
    scale,
    index_shape,
    size_shape,
    special_shape,
    hidden_shape,
    residual_shape,
    removed,
    targets,
    *args,
    out_shape=None,
    **kwargs,
) -> int:
    """2 a multiply-accumulate of the similarities."""
    compared = hidden_shape or residual_shape
    return 2 * compared[0] * removed * targets * compared[2] if compared else 0
