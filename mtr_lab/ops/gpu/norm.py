"""Residual addition and RMS normalisation as a Triton kernel, which carries out a reduction plan on the way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

SCANNED = 32  # removed tokens up to which every output token looks through all of them for its own


@triton.jit
def _weighted(x, weight, token, channels, c):
    return tl.load(x + token * channels + c, c < channels, 0).to(tl.float32) * tl.load(weight + token)


@triton.jit
def _merged(x, image, length, channels, c, j, i, gone, start, dest, weight, removed,
            REDUCE: tl.constexpr, LISTED: tl.constexpr):  # fmt: skip
    """Token i of an image, weighted, and the tokens that are merged into it, at output position j."""
    total = tl.load(x + (image * length + i) * channels + c, c < channels, 0).to(tl.float32)
    if REDUCE:
        total *= tl.load(weight + image * length + i)
    if LISTED:
        own = start + image * (length - removed + 1) + j
        for k in range(tl.load(own), tl.load(own + 1)):
            total += _weighted(x, weight, image * length + tl.load(gone + image * removed + k), channels, c)
    elif REDUCE:
        for k in range(removed):
            other = image * length + tl.load(gone + image * removed + k)
            if tl.load(dest + other) == j:
                total += _weighted(x, weight, other, channels, c)
    return total


@triton.jit(do_not_specialize=["length", "removed"])
def _add_norm(hidden, residual, weight, normed, total, keep, gone, start, dest, share,
              residual_gone, residual_start, residual_dest, residual_share, length, removed, channels, eps,
              ADD: tl.constexpr, REDUCE: tl.constexpr, LISTED: tl.constexpr, C: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kept = length - removed
    image, j = row // kept, row % kept
    i = tl.load(keep + row) if REDUCE else j
    c = tl.arange(0, C)
    x = _merged(hidden, image, length, channels, c, j, i, gone, start, dest, share, removed, REDUCE, LISTED)
    if ADD:
        x += _merged(residual, image, length, channels, c, j, i, residual_gone, residual_start, residual_dest,
                     residual_share, removed, REDUCE, LISTED)  # fmt: skip
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
    listed = length - kept > SCANNED
    sources = residual_sources = (gone, gone)
    if listed:
        sources = residual_sources = _sources(dest, gone, kept)
        if residual_dest is not dest:
            residual_sources = _sources(residual_dest, gone, kept)
    plan = (keep, *sources, dest, share, *residual_sources, residual_dest, residual_share)
    absent = weight  # stands for a tensor the kernel does not read
    _add_norm[(images * kept,)](
        hidden.contiguous(), absent if residual is None else residual.contiguous(), weight, normed, total,
        *(absent if t is None else t.contiguous() for t in plan), length, length - kept, channels, eps,
        ADD=residual is not None, REDUCE=keep is not None, LISTED=listed, **_row(channels),
    )  # fmt: skip
    return normed, total


@triton.jit(do_not_specialize=["length", "removed"])
def _apply(x, y, keep, gone, start, dest, share, length, removed, channels, LISTED: tl.constexpr, C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    kept = length - removed
    image, j = row // kept, row % kept
    c = tl.arange(0, C)
    i = tl.load(keep + row)
    out = _merged(x, image, length, channels, c, j, i, gone, start, dest, share, removed, True, LISTED)
    tl.store(y + row * channels + c, out.to(y.dtype.element_ty), c < channels)


def apply_plan(x: Tensor, dest: Tensor, weight: Tensor, keep: Tensor, gone: Tensor) -> Tensor:
    """The contract of ``mtr_lab.ops.apply_plan``, on a GPU; sums in the same order on every run."""
    x = x.contiguous()
    images, length, channels = x.shape
    kept = keep.shape[1]
    y = x.new_empty(images, kept, channels)
    listed = length - kept > SCANNED
    plan = keep, *(_sources(dest, gone, kept) if listed else (gone, gone)), dest, weight
    _apply[(images * kept,)](
        x, y, *(t.contiguous() for t in plan), length, length - kept, channels, LISTED=listed, **_row(channels)
    )
    return y


def _sources(dest: Tensor | None, gone: Tensor | None, kept: int) -> tuple[Tensor, Tensor]:
    """The removed tokens in the order of where they go, (B, r), and where those of each survivor start, (B, M + 1)."""
    assert dest is not None
    assert gone is not None
    target, order = dest.gather(1, gone).sort(dim=1, stable=True)
    survivors = torch.arange(kept + 1, device=dest.device).expand(len(dest), -1)
    return gone.gather(1, order), torch.searchsorted(target, survivors.contiguous())


def _row(channels: int) -> dict[str, int]:
    """A program's share, one token, and its threads: 16 channels each, as far as a program may have threads."""
    size = triton.next_power_of_2(channels)
    return {"C": size, "num_warps": min(max(size // 512, 1), 8)}
