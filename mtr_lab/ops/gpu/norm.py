"""Residual addition and RMS normalisation as a Triton kernel, which carries out a reduction plan on the way."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _merged(x, image, length, channels, c, j, i, gone, dest, weight, removed, REDUCE: tl.constexpr):
    """Token i of an image, weighted, and the tokens that are merged into it, at output position j."""
    there = c < channels
    total = tl.load(x + (image * length + i) * channels + c, there, 0).to(tl.float32)
    if REDUCE:
        total *= tl.load(weight + image * length + i)
        for k in range(removed):
            other = tl.load(gone + image * removed + k)
            if tl.load(dest + image * length + other) == j:
                share = tl.load(weight + image * length + other)
                total += tl.load(x + (image * length + other) * channels + c, there, 0).to(tl.float32) * share
    return total


@triton.jit(do_not_specialize=["length", "removed"])
def _add_norm(hidden, residual, weight, normed, total, keep, gone, dest, share, residual_dest, residual_share,
              length, removed, channels, eps,
              ADD: tl.constexpr, REDUCE: tl.constexpr, C: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kept = length - removed
    image, j = row // kept, row % kept
    i = tl.load(keep + row) if REDUCE else j
    c = tl.arange(0, C)
    x = _merged(hidden, image, length, channels, c, j, i, gone, dest, share, removed, REDUCE)
    if ADD:
        x += _merged(residual, image, length, channels, c, j, i, gone, residual_dest, residual_share, removed, REDUCE)
    there = c < channels
    tl.store(total + row * channels + c, x, there)
    scale = tl.rsqrt(tl.sum(x * x, 0) / channels + eps)
    y = x * scale * tl.load(weight + c, there, 0).to(tl.float32)
    tl.store(normed + row * channels + c, y.to(normed.dtype.element_ty), there)


def rms_norm_add(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    dest: Tensor | None,
    share: Tensor | None,
    keep: Tensor | None,
    gone: Tensor | None,
    residual_dest: Tensor | None,
    residual_share: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The contract of ``mtr_lab.ops.rms_norm_add``, on a GPU, with the plan in pieces."""
    images, length, channels = hidden.shape
    kept = length if keep is None else keep.shape[1]
    normed = hidden.new_empty(images, kept, channels)
    total = hidden.new_empty(images, kept, channels, dtype=torch.float32)
    plan = (keep, gone, dest, share, residual_dest, residual_share)
    absent = weight  # stands for a tensor the kernel does not read
    _add_norm[(images * kept,)](
        hidden.contiguous(), absent if residual is None else residual.contiguous(), weight, normed, total,
        *(absent if t is None else t.contiguous() for t in plan), length, length - kept, channels, eps,
        ADD=residual is not None, REDUCE=keep is not None, **_row(channels),
    )  # fmt: skip
    return normed, total


@triton.jit(do_not_specialize=["length", "removed"])
def _apply(x, y, keep, gone, dest, share, length, removed, channels, C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    kept = length - removed
    image, j = row // kept, row % kept
    c = tl.arange(0, C)
    out = _merged(x, image, length, channels, c, j, tl.load(keep + row), gone, dest, share, removed, True)
    tl.store(y + row * channels + c, out.to(y.dtype.element_ty), c < channels)


def apply_plan(x: Tensor, dest: Tensor, weight: Tensor, keep: Tensor, gone: Tensor) -> Tensor:
    """The contract of ``mtr_lab.ops.apply_plan``, on a GPU; sums in the order of ``gone``, the same on every run."""
    x = x.contiguous()
    images, length, channels = x.shape
    kept = keep.shape[1]
    y = x.new_empty(images, kept, channels)
    _apply[(images * kept,)](
        x, y, *(t.contiguous() for t in (keep, gone, dest, weight)), length, length - kept, channels, **_row(channels)
    )
    return y


def _row(channels: int) -> dict[str, int]:
    """A program's share, one token, and its threads: 16 channels each, as far as a program may have threads."""
    size = triton.next_power_of_2(channels)
    return {"C": size, "num_warps": min(max(size // 512, 1), 8)}
