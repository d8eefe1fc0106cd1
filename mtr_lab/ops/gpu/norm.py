"""Residual addition and normalisation as a Triton kernel, which carries out a reduction plan on the way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.launch import on_its_device


@triton.jit
def _token(x, token, channels, c):
    return tl.load(x + token * channels + c, c < channels, 0).to(tl.float32)


@triton.jit
def _merged(total, x, image, j, length, removed, channels, c, weight, gone, start):
    """What output position j of an image has, and the tokens that are merged into it, weighted."""
    own = start + image * (length - removed + 1) + j
    for k in range(tl.load(own), tl.load(own + 1)):
        other = image * length + tl.load(gone + image * removed + k)
        total += _token(x, other, channels, c) * tl.load(weight + other)
    return total


@triton.jit(do_not_specialize=["length", "removed"])
def _add_norm(hidden, residual, weight, bias, normed, total, keep, share, gone, start, residual_share, residual_gone,
              residual_start, length, removed, channels, eps, ADD: tl.constexpr, REDUCE: tl.constexpr,
              C: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    kept = length - removed
    image, j = (row // kept).to(tl.int64), row % kept
    row = row.to(tl.int64)
    c = tl.arange(0, C)
    token = image * length + tl.load(keep + row) if REDUCE else row
    x = _token(hidden, token, channels, c)
    if REDUCE:
        x *= tl.load(share + token)
    if ADD:  # before any waits for what may be merged
        stream = _token(residual, token, channels, c)
        x += stream * tl.load(residual_share + token) if REDUCE else stream
    if REDUCE:
        x = _merged(x, hidden, image, j, length, removed, channels, c, share, gone, start)
        if ADD:
            x = _merged(x, residual, image, j, length, removed, channels, c, residual_share, residual_gone,
                        residual_start)  # fmt: skip
    there = c < channels
    tl.store(total + row * channels + c, x, there)
    if bias is not None:  # LayerNorm
        x = tl.where(there, x - tl.sum(x, 0) / channels, 0)
    scale = tl.rsqrt(tl.sum(x * x, 0) / channels + eps)
    y = x * scale * tl.load(weight + c, there, 0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + c, there, 0).to(tl.float32)
    tl.store(normed + row * channels + c, y.to(normed.dtype.element_ty), there)


@on_its_device
def norm_add(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    keep: Tensor | None,
    *lists: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The contract of ``mtr_lab.ops.layer_norm_add``, and of ``rms_norm_add`` without a bias; the plan is in pieces.

    Args:
        keep: of the plan.
        lists: weight, gone and start of the plan for ``hidden``, then of the plan for ``residual``.
    """
    images, length, channels = hidden.shape
    kept = length if keep is None else keep.shape[1]
    normed = hidden.new_empty(images, kept, channels)
    total = hidden.new_empty(images, kept, channels, dtype=torch.float32)
    absent = weight  # stands for a tensor the kernel does not read
    _add_norm[(images * kept,)](
        hidden.contiguous(), absent if residual is None else residual.contiguous(), weight,
        bias, normed, total,
        *(absent if t is None else t.contiguous() for t in (keep, *lists)), length, length - kept, channels, eps,
        ADD=residual is not None, REDUCE=keep is not None, **row(channels),
    )  # fmt: skip
    return normed, total


@triton.jit(do_not_specialize=["length", "removed"])
def _apply(x, y, keep, weight, gone, start, length, removed, channels, C: tl.constexpr):
    row = tl.program_id(0)
    kept = length - removed
    image, j = (row // kept).to(tl.int64), row % kept
    row = row.to(tl.int64)
    c = tl.arange(0, C)
    token = image * length + tl.load(keep + row)
    out = _token(x, token, channels, c) * tl.load(weight + token)
    out = _merged(out, x, image, j, length, removed, channels, c, weight, gone, start)
    tl.store(y + row * channels + c, out.to(y.dtype.element_ty), c < channels)


@on_its_device
def apply_plan(x: Tensor, weight: Tensor, keep: Tensor, gone: Tensor, start: Tensor) -> Tensor:
    """The contract of ``mtr_lab.ops.apply_plan``, on a GPU; sums in the same order on every run."""
    x = x.contiguous()
    images, length, channels = x.shape
    kept = keep.shape[1]
    y = x.new_empty(images, kept, channels)
    plan = (t.contiguous() for t in (keep, weight, gone, start))
    _apply[(images * kept,)](x, y, *plan, length, length - kept, channels, **row(channels))
    return y


def row(channels: int) -> dict[str, int]:
    """A program's share, one token, and its threads: 16 channels each, as far as a program may have threads."""
    size = triton.next_power_of_2(channels)
    return {"C": size, "num_warps": min(max(size // 512, 1), 8)}
