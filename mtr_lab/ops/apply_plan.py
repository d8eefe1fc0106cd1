"""Move tokens where a reduction plan sends them."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def apply_plan(x: Tensor, dest: Tensor, weight: Tensor, keep: Tensor, gone: Tensor) -> Tensor:
    """Gather the survivors and add to each the tokens merged into it.

    ``out[b, j] = Σ weight[b, i] · x[b, i]`` over the tokens i with ``dest[b, i] == j``.

    Args:
        x: (B, L, C).
        dest: (B, L) int64, the output position of each token, -1 if it is dropped. Every output position is the
            destination of the token ``keep`` names for it.
        weight: (B, L), the share of each token in the output it goes to.
        keep: (B, M) int64, the input position of the survivor at each output position.
        gone: (B, L - M) int64, the input positions of all others.

    Returns:
        (B, M, C) in the dtype of ``x``, accumulated in float32 (float64 for float64); a survivor with weight 1 and
        nothing merged into it is copied bit for bit. Differentiable in ``x``.
    """
    return _apply(x, dest, weight, keep, gone)


@torch.library.custom_op("mtr_lab::apply_plan", mutates_args=())
def _apply(x: Tensor, dest: Tensor, weight: Tensor, keep: Tensor, gone: Tensor) -> Tensor:
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


@_apply.register_fake
def _(x, dest, weight, keep, gone):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], keep.shape[1], x.shape[2])


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, dest, weight, *_ = inputs
    ctx.save_for_backward(dest, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dest, weight = ctx.saved_tensors
    index = dest.clamp(min=0)[..., None].expand(-1, -1, grad.shape[2])
    share = weight.masked_fill(dest < 0, 0)[..., None].to(grad.dtype)
    return grad.gather(1, index) * share, None, None, None, None


_apply.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.mtr_lab.apply_plan)
def apply_plan_flops(x_shape, dest_shape, weight_shape, keep_shape, gone_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """2 a multiply-accumulate: one for every channel of every token that does not survive."""
    batch, _, channels = x_shape
    return 2 * batch * gone_shape[1] * channels
