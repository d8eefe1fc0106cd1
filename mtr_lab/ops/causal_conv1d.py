"""Depthwise causal convolution followed by SiLU, all directions of a block at once."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.errors import UserError
from mtr_lab.ops import backend, cpu
from mtr_lab.ops.vjp import vjp


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, *, reverse: Sequence[bool] = (False,)) -> Tensor:
    """``silu(conv(x))`` for each direction; output t sees tokens t-W+1 … t in the direction's reading order.

    Args:
        x: (B, L, E), shared by the directions.
        weight: (G, E, W), in the upstream orientation: tap W-1 multiplies the current token.
        bias: (G, E).
        reverse: for each of the G directions, whether it reads from the last token to the first.

    Returns:
        (G, B, L, E) in the dtype of ``x``.

    Raises:
        UserError: shapes that do not fit each other, or a selected backend that cannot run these inputs.
    """
    directions, channels, _ = weight.shape
    if x.ndim != 3 or x.shape[2] != channels or bias.shape != (directions, channels) or len(reverse) != directions:
        raise UserError(
            f"causal_conv1d: x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)} and "
            f"reverse={tuple(reverse)} do not fit: expected (B, L, E), (G, E, W), (G, E) and G directions."
        )
    order = [int(r) for r in reverse]  # the tracer of torch.jit takes no list of booleans
    if backend.transformed():
        return causal_conv1d_reference(x, weight, bias, order)
    return _conv(x, weight, bias, order, backend.pick(x, package="causal_conv1d"))


def causal_conv1d_reference(x: Tensor, weight: Tensor, bias: Tensor, reverse: Sequence[int]) -> Tensor:
    """Sum of W shifted products, plain and differentiable; no transpose of the channels-last input."""
    length, width = x.shape[1], weight.shape[-1]
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    outputs = []
    for g, backward in enumerate(reverse):
        padded = F.pad(x, (0, 0, 0, width - 1) if backward else (0, 0, width - 1, 0))
        taps = weight[g].flip(-1) if backward else weight[g]  # (E, W), in token order
        y = bias[g] + sum(padded[:, k : k + length] * taps[:, k] for k in range(width))
        outputs.append(F.silu(y))
    return torch.stack(outputs)


def causal_conv1d_backward_reference(
    x: Tensor, weight: Tensor, bias: Tensor, reverse: Sequence[int], grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``x``, ``weight`` and ``bias`` from ``grad`` (G, B, L, E), plain and differentiable."""
    length, width = x.shape[1], weight.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    tokens, grad_x = x.to(wide), torch.zeros_like(x, dtype=wide)
    grad_weight, grad_bias = [], []
    for g, backward in enumerate(reverse):
        before, after = (0, 0, width - 1, 0), (0, 0, 0, width - 1)
        padded = F.pad(tokens, after if backward else before)
        taps = (weight[g].flip(-1) if backward else weight[g]).to(wide)
        total = bias[g].to(wide) + sum(padded[:, k : k + length] * taps[:, k] for k in range(width))
        gate = torch.sigmoid(total)
        grad_total = grad[g].to(wide) * gate * (1 + total * (1 - gate))
        grad_taps = [(padded[:, k : k + length] * grad_total).sum((0, 1)) for k in range(width)]
        grad_weight.append(torch.stack(grad_taps[::-1] if backward else grad_taps, dim=-1))
        grad_bias.append(grad_total.sum((0, 1)))
        spread = F.pad(grad_total, before if backward else after)
        grad_x = grad_x + sum(spread[:, width - 1 - k :][:, :length] * taps[:, k] for k in range(width))
    return (
        grad_x.to(x.dtype),
        torch.stack(grad_weight).to(weight.dtype),
        torch.stack(grad_bias).to(bias.dtype),
    )


def causal_conv1d_cuda(x: Tensor, weight: Tensor, bias: Tensor, reverse: Sequence[int]) -> Tensor:
    """The authors' CUDA kernel, one launch a direction, on channels-first copies."""
    from causal_conv1d import causal_conv1d_fn

    outputs = []
    for g, backward in enumerate(reverse):
        y = causal_conv1d_fn(
            (x.flip(1) if backward else x).transpose(1, 2).contiguous(),
            weight[g].to(x.dtype),
            bias[g].to(x.dtype),
            activation="silu",
        ).transpose(1, 2)
        outputs.append(y.flip(1) if backward else y)
    return torch.stack(outputs)


def causal_conv1d_triton(x: Tensor, weight: Tensor, bias: Tensor, reverse: Sequence[int]) -> Tensor:
    """One kernel for all directions."""
    from mtr_lab.ops.gpu import conv

    return conv.causal_conv1d(x, weight, bias, reverse)


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "reference": causal_conv1d_reference,
    "portable": causal_conv1d_reference,
    "cpu": cpu.causal_conv1d,
    "triton": causal_conv1d_triton,
    "mamba_ssm": causal_conv1d_cuda,
}


@torch.library.custom_op("mtr_lab::causal_conv1d", mutates_args=())
def _conv(x: Tensor, weight: Tensor, bias: Tensor, reverse: Sequence[int], implementation: str) -> Tensor:
    return IMPLEMENTATIONS[implementation](x, weight, bias, reverse)


@_conv.register_fake
def _(x, weight, bias, reverse, implementation):  # type: ignore[no-untyped-def]
    return x.new_empty(weight.shape[0], *x.shape)


@torch.library.custom_op("mtr_lab::causal_conv1d_backward", mutates_args=())
def _conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, reverse: Sequence[int], implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    if implementation == "triton":
        from mtr_lab.ops.gpu import conv

        grads = conv.causal_conv1d_backward(x, weight, bias, reverse, grad)
    else:
        grads = causal_conv1d_backward_reference(x, weight, bias, reverse, grad)
    return tuple(t.contiguous() for t in grads)  # type: ignore[return-value]


@_conv_backward.register_fake
def _(x, weight, bias, grad, reverse, implementation):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.reverse, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
    inputs = ctx.saved_tensors
    name = backend.pick_differentiable(inputs[0], package="causal_conv1d")
    if name == "mamba_ssm" and not torch.is_grad_enabled():  # its gradients have none
        return *vjp(partial(IMPLEMENTATIONS[name], reverse=ctx.reverse), inputs, grad), None, None
    return *_conv_backward(*inputs, grad, ctx.reverse, name), None, None


def _second_backward(ctx: Any, *grads: Tensor) -> tuple[Optional[Tensor], ...]:
    def first(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return causal_conv1d_backward_reference(x, weight, bias, ctx.reverse, grad)

    return *vjp(first, ctx.saved_tensors, grads), None, None


_conv.register_autograd(_backward, setup_context=_setup)
_conv_backward.register_autograd(_second_backward, setup_context=_setup)


@register_flop_formula(torch.ops.mtr_lab.causal_conv1d)
def causal_conv1d_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """2 a multiply-accumulate: W taps for every token, channel and direction."""
    directions, _, width = weight_shape
    batch, length, channels = x_shape
    return 2 * directions * batch * length * channels * width
