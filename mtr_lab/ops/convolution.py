"""Depthwise causal convolution followed by SiLU, in all directions of a block."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.errors import UserError
from mtr_lab.ops.convolution_unmerged import CAUSAL_CONV1D_UNMERGED, take_rows
from mtr_lab.ops.registry import Implementation, Operation
from mtr_lab.ops.vjp import vjp


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    reverse: Sequence[bool] = (False,),
    index: Tensor | None = None,
    source: Tensor | None = None,
) -> Tensor:
    """``silu(conv(x))`` for each direction; output t sees tokens t-W+1 … t in the direction's reading order.

    With ``index`` and ``source`` the convolution runs over the L0 original positions of a reduced sequence, at each of
    which stands the token that has absorbed it: output t sees positions ``index[t]``-W+1 … ``index[t]``.

    Args:
        x: (B, L, E), shared by the directions.
        weight: (G, E, W), oriented as in ``nn.Conv1d``: tap W-1 multiplies the current token.
        bias: (G, E).
        reverse: for each of the G directions, whether it reads from the last token to the first.
        index: (B, L) int64, the original position of each token.
        source: (B, L0) int64, the token that stands at each original position, -1 for zeros. Both or neither are given;
            their values are not checked: wrong ones would be read out of bounds.

    Returns:
        (G, B, L, E) in the dtype of ``x``.

    Raises:
        UserError: shapes that do not match, or a selected backend that cannot run these inputs.
    """
    directions, channels, _ = weight.shape
    if x.ndim != 3 or x.shape[2] != channels or bias.shape != (directions, channels) or len(reverse) != directions:
        raise UserError(
            f"causal_conv1d: x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)} and "
            f"reverse={tuple(reverse)} do not fit: expected (B, L, E), (G, E, W), (G, E) and G directions."
        )
    directions_read = [int(r) for r in reverse]  # integers: the tracer of torch.jit takes no list of booleans
    if index is None or source is None:
        return CAUSAL_CONV1D(x, weight, bias, directions_read)
    if index.shape != x.shape[:2] or source.ndim != 2 or source.shape[0] != x.shape[0]:
        raise UserError(
            f"causal_conv1d: index {tuple(index.shape)} and source {tuple(source.shape)} do not fit x "
            f"{tuple(x.shape)}: expected (B, L) and (B, L0)."
        )
    if torch.is_grad_enabled():  # with the gradients of the convolution and of gathering
        unmerged = take_rows(x, source.clamp(min=0)).masked_fill((source < 0)[..., None], 0)
        y = CAUSAL_CONV1D(unmerged, weight, bias, directions_read)
        return take_rows(y, index.expand(directions, -1, -1))
    return CAUSAL_CONV1D_UNMERGED(x, weight, bias, index, source, directions_read)


def causal_conv1d_reference(x: Tensor, weight: Tensor, bias: Tensor, reverse: Sequence[int]) -> Tensor:
    """A sum of W shifted products in plain PyTorch, without a transpose of the channels-last input.

    Arguments and result as ``causal_conv1d``.
    """
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
    """The gradients of ``x``, ``weight`` and ``bias`` for ``grad`` (G, B, L, E), in plain PyTorch.

    Other arguments as ``causal_conv1d``; each gradient has the shape and the dtype of its input.
    """
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
        grad_x.to(x.dtype).contiguous(),
        torch.stack(grad_weight).to(weight.dtype),
        torch.stack(grad_bias).to(bias.dtype),
    )


def causal_conv1d_cuda(x: Tensor, weight: Tensor, bias: Tensor, reverse: Sequence[int]) -> Tensor:
    """The authors' CUDA kernel, one launch a direction, on channels-first copies.

    Arguments and result as ``causal_conv1d``.
    """
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
    """One kernel for all directions. Arguments and result as ``causal_conv1d``."""
    from mtr_lab.ops.gpu import conv

    return conv.causal_conv1d(x, weight, bias, reverse)


def causal_conv1d_backward_triton(
    x: Tensor, weight: Tensor, bias: Tensor, reverse: Sequence[int], grad: Tensor
) -> tuple[Tensor, ...]:
    """Two kernels for the gradients. Arguments and result as ``causal_conv1d_backward_reference``."""
    from mtr_lab.ops.gpu import conv

    return conv.causal_conv1d_backward(x, weight, bias, reverse, grad)


def causal_conv1d_backward_cuda(
    x: Tensor, weight: Tensor, bias: Tensor, reverse: Sequence[int], grad: Tensor
) -> Sequence[Tensor | None]:
    """The gradients of the authors' CUDA kernel, not differentiable.

    Arguments and result as ``causal_conv1d_backward_reference``.
    """
    return vjp(partial(causal_conv1d_cuda, reverse=reverse), (x, weight, bias), grad)


def _causal_conv1d_cpu(x: Tensor, weight: Tensor, bias: Tensor, reverse: Sequence[int]) -> Tensor:
    from mtr_lab.ops.cpu import convolution

    return convolution.causal_conv1d(x, weight, bias, reverse)


def _has_no_gradient(*inputs: Any) -> str:
    return "has no second derivatives" if torch.is_grad_enabled() else ""


CAUSAL_CONV1D = Operation(
    "causal_conv1d",
    [
        Implementation("triton", causal_conv1d_triton, package="triton"),
        Implementation("cpu", _causal_conv1d_cpu),
        Implementation("mamba_ssm", causal_conv1d_cuda, package="causal_conv1d"),
        Implementation("reference", causal_conv1d_reference),
    ],
    schema=("Tensor x, Tensor weight, Tensor bias, int[] reverse", "Tensor"),
    fake=lambda x, weight, bias, reverse: x.new_empty(weight.shape[0], *x.shape),
)

CAUSAL_CONV1D_BACKWARD = Operation(
    "causal_conv1d_backward",
    [
        Implementation("triton", causal_conv1d_backward_triton, package="triton"),
        Implementation(
            "mamba_ssm", causal_conv1d_backward_cuda, unfit=_has_no_gradient, package="causal_conv1d", composed=True
        ),
        Implementation("reference", causal_conv1d_backward_reference),
    ],
    schema=("Tensor x, Tensor weight, Tensor bias, int[] reverse, Tensor grad", "(Tensor, Tensor, Tensor)"),
    fake=lambda x, weight, bias, reverse, grad: tuple(t.new_empty(t.shape) for t in (x, weight, bias)),
    strict=False,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, ctx.reverse, *grad = inputs[:-1]
    ctx.save_for_backward(x, weight, bias, *grad)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *CAUSAL_CONV1D_BACKWARD(*ctx.saved_tensors, ctx.reverse, grad), None, None


def _second_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    def first_gradients(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return causal_conv1d_backward_reference(x, weight, bias, ctx.reverse, grad)

    *second, of_grad = vjp(first_gradients, ctx.saved_tensors, grads)
    return *second, None, of_grad, None


CAUSAL_CONV1D.operator.register_autograd(_backward, setup_context=_setup)
CAUSAL_CONV1D_BACKWARD.operator.register_autograd(_second_backward, setup_context=_setup)


@register_flop_formula(torch.ops.mtr_lab.causal_conv1d)
def causal_conv1d_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """2 FLOPs per tap, token, channel and direction."""
    directions, _, width = weight_shape
    batch, length, channels = x_shape
    return 2 * directions * batch * length * channels * width
