"""The gradients of residual addition and normalisation in one pass over the tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.norm import row
from mtr_lab.ops.gpu.occupancy import num_sms, on_its_device

PROGRAMS = 16  # for each multiprocessor; they share the tokens evenly


@triton.jit(do_not_specialize=["tokens"])
def _norm_backward(total, weight, normed_grad, total_grad, hidden_grad, residual_grad, weight_grad, bias_grad, tokens,
                   channels: tl.constexpr, eps, C: tl.constexpr):  # fmt: skip
    c = tl.arange(0, C)
    mask = c < channels
    w = tl.load(weight + c, mask, 0).to(tl.float32)
    dw = tl.zeros((C,), tl.float32)
    db = tl.zeros((C,), tl.float32)
    at = tl.program_id(0).to(tl.int64) * channels + c
    for _ in range(tl.program_id(0), tokens, tl.num_programs(0)):
        x = tl.load(total + at, mask, 0)
        dy = tl.load(normed_grad + at, mask, 0).to(tl.float32)
        dx = tl.load(total_grad + at, mask, 0)
        if bias_grad is not None:
            x = tl.where(mask, x - tl.sum(x, 0) / channels, 0)
            db += dy
        scale = tl.rsqrt(tl.sum(x * x, 0) / channels + eps)
        y = x * scale
        dw += dy * y
        dy *= w
        if bias_grad is not None:
            dy -= tl.where(mask, tl.sum(dy, 0) / channels, 0)
        dx += scale * (dy - y * (tl.sum(dy * y, 0) / channels))
        tl.store(hidden_grad + at, dx.to(hidden_grad.dtype.element_ty), mask)
        if residual_grad is not None:
            tl.store(residual_grad + at, dx, mask)
        at += tl.num_programs(0).to(tl.int64) * channels
    part = tl.program_id(0) * channels + c
    tl.store(weight_grad + part, dw, mask)
    if bias_grad is not None:
        tl.store(bias_grad + part, db, mask)


@on_its_device
def norm_add_backward(
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    normed_grad: Tensor,
    total_grad: Tensor,
    *,
    residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The gradients of ``mtr_lab.ops.gpu.norm.norm_add`` without a plan. Deterministic.

    Args:
        total: the sum of the two streams, (B, L, C) float32, contiguous.
        weight, bias, eps: as for ``norm_add``.
        normed_grad: the gradient of ``normed``, (B, L, C) in the dtype of ``hidden``.
        total_grad: the gradient of ``total``, (B, L, C) float32.
        residual: whether ``norm_add`` had a residual stream.

    Returns:
        The gradients of hidden, residual, weight and bias; ``None`` for an absent one.
    """
    channels = total.shape[-1]
    tokens = total.numel() // channels
    programs = max(1, min(PROGRAMS * num_sms(total.device), tokens))
    hidden_grad = total.new_empty(total.shape, dtype=normed_grad.dtype)
    # Both streams have the same gradient; the kernel writes it twice only in two dtypes.
    residual_grad = torch.empty_like(total) if residual and hidden_grad.dtype != total.dtype else None
    weight_grad = total.new_empty(programs, channels)
    bias_grad = None if bias is None else torch.empty_like(weight_grad)
    _norm_backward[(programs,)](
        total, weight, normed_grad.contiguous(), total_grad.contiguous(), hidden_grad, residual_grad, weight_grad,
        bias_grad, tokens, channels, eps, **row(channels),
    )  # fmt: skip
    if residual and residual_grad is None:
        residual_grad = hidden_grad.clone()
    dbias = None if bias_grad is None else bias_grad.sum(0).to(weight.dtype)
    return hidden_grad, residual_grad, weight_grad.sum(0).to(weight.dtype), dbias
