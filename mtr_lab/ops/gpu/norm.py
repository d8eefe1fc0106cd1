"""Residual addition and normalisation in one Triton kernel, with a reduction plan fused into its loads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.occupancy import on_its_device


@triton.jit
def _token(x, token, channels, c):
    return tl.load(x + token * channels + c, c < channels, 0).to(tl.float32)


@triton.jit
def _merged(total, x, image, j, length, num_removed, channels, c, weight, removed, offsets):
    """``total`` plus the weighted tokens that are merged into output position j of an image."""
    own = offsets + image * (length - num_removed + 1) + j
    for k in range(tl.load(own), tl.load(own + 1)):
        other = image * length + tl.load(removed + image * num_removed + k)
        total += _token(x, other, channels, c) * tl.load(weight + other)
    return total


@triton.jit(do_not_specialize=["length", "num_removed"])
def _add_norm(hidden, residual, weight, bias, normed, total, keep, share, removed, offsets, residual_share,
              residual_removed, residual_offsets, length, num_removed, channels, eps, ADD: tl.constexpr,
              REDUCE: tl.constexpr, MERGED: tl.constexpr, C: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    kept = length - num_removed
    image, j = (row // kept).to(tl.int64), row % kept
    row = row.to(tl.int64)
    c = tl.arange(0, C)
    token = image * length + tl.load(keep + row) if REDUCE else row
    x = _token(hidden, row if MERGED else token, channels, c)
    if REDUCE and not MERGED:
        x *= tl.load(share + token)
    if ADD:  # loaded before the loops over merged tokens, which wait for their bounds
        stream = _token(residual, token, channels, c)
        x += stream * tl.load(residual_share + token) if REDUCE else stream
    if REDUCE:
        if not MERGED:
            x = _merged(x, hidden, image, j, length, num_removed, channels, c, share, removed, offsets)
        if ADD:
            x = _merged(x, residual, image, j, length, num_removed, channels, c, residual_share, residual_removed,
                        residual_offsets)  # fmt: skip
    mask = c < channels
    tl.store(total + row * channels + c, x, mask)
    if bias is not None:  # LayerNorm
        x = tl.where(mask, x - tl.sum(x, 0) / channels, 0)
    scale = tl.rsqrt(tl.sum(x * x, 0) / channels + eps)
    y = x * scale * tl.load(weight + c, mask, 0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + c, mask, 0).to(tl.float32)
    tl.store(normed + row * channels + c, y.to(normed.dtype.element_ty), mask)


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
    """The contract of ``layer_norm_add`` and, without a bias, ``rms_norm_add`` of ``mtr_lab.ops``.

    Args:
        keep: of the plan, or ``None`` for no plan.
        lists: weight, removed and offsets of the plan for ``hidden``, then of the plan for ``residual``.
    """
    images, _, channels = hidden.shape
    length = (hidden if residual is None else residual).shape[1]
    kept = length if keep is None else keep.shape[1]
    normed = hidden.new_empty(images, kept, channels)
    total = hidden.new_empty(images, kept, channels, dtype=torch.float32)
    absent = weight  # stands for a tensor that the kernel does not read
    _add_norm[(images * kept,)](
        hidden.contiguous(), absent if residual is None else residual.contiguous(), weight,
        bias, normed, total,
        *(absent if t is None else t.contiguous() for t in (keep, *lists)), length, length - kept, channels, eps,
        ADD=residual is not None, REDUCE=keep is not None, MERGED=hidden.shape[1] < length, **row(channels),
    )  # fmt: skip
    return normed, total


@triton.jit(do_not_specialize=["length", "num_removed"])
def _apply(x, y, keep, weight, removed, offsets, length, num_removed, channels, C: tl.constexpr):
    row = tl.program_id(0)
    kept = length - num_removed
    image, j = (row // kept).to(tl.int64), row % kept
    row = row.to(tl.int64)
    c = tl.arange(0, C)
    token = image * length + tl.load(keep + row)
    out = _token(x, token, channels, c) * tl.load(weight + token)
    out = _merged(out, x, image, j, length, num_removed, channels, c, weight, removed, offsets)
    tl.store(y + row * channels + c, out.to(y.dtype.element_ty), c < channels)


@on_its_device
def apply_plan(x: Tensor, weight: Tensor, keep: Tensor, removed: Tensor, offsets: Tensor) -> Tensor:
    """The contract of ``mtr_lab.ops.apply_plan``, on a GPU. Deterministic."""
    x = x.contiguous()
    images, length, channels = x.shape
    kept = keep.shape[1]
    y = x.new_empty(images, kept, channels)
    plan = (t.contiguous() for t in (keep, weight, removed, offsets))
    _apply[(images * kept,)](x, y, *plan, length, length - kept, channels, **row(channels))
    return y


def row(channels: int) -> dict[str, int]:
    """A token's channels, padded to a power of two, and its program's warps: up to 8, of 16 channels a thread."""
    size = triton.next_power_of_2(channels)
    return {"C": size, "num_warps": min(max(size // 512, 1), 8)}
