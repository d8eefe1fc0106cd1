"""A whole reduction decision as one Triton kernel: rank, group, match, merge and the survivors' order.

One program an image: the numbers are small (some two hundred tokens, a few removed), launches are what costs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.launch import INTERPRETED, autotuned

MAX_LENGTH = 1024
MAX_REMOVED = 128


@triton.jit
def _features(hidden, residual, row, channels, c, there, HIDDEN: tl.constexpr, RESIDUAL: tl.constexpr):
    at = row[:, None] * channels + c[None, :]
    there = there[:, None] & (c < channels)[None, :]
    x = tl.zeros(at.shape, tl.float32)
    if HIDDEN:
        x += tl.load(hidden + at, there, 0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual + at, there, 0).to(tl.float32)
    return x


@autotuned([triton.Config({"CK": step}, num_warps=warps) for step, warps in ((32, 8), (64, 8), (64, 4))], key=["channels"])
@triton.jit(do_not_specialize=["length", "removed", "targets", "specials"])
def _plan(score, special, size, hidden, residual, order, into, dest, weight, keep, gone,
          length, removed, targets, specials, channels,
          MATCH: tl.constexpr, SIZE: tl.constexpr, HIDDEN: tl.constexpr, RESIDUAL: tl.constexpr,
          PRECISION: tl.constexpr, LP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
          CK: tl.constexpr):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    first, last = image * length, image * (length - removed)
    score, order, into = score + first, order + first, into + image * removed
    special += image * specials
    i = tl.arange(0, LP)
    block = tl.arange(0, BLOCK)
    exists = i < length

    # Rank: how many tokens come before each one; the protected come last.
    own = tl.load(score + i, exists, float("inf"))
    for s in range(specials):
        own = tl.where(i == tl.load(special + s), float("inf"), own)
    rank = tl.zeros((LP,), tl.int32)
    for j0 in range(0, length, BLOCK):
        j = j0 + block
        other = tl.load(score + j, j < length, float("inf"))
        for s in range(specials):
            other = tl.where(j == tl.load(special + s), float("inf"), other)
        before = (other[:, None] < own[None, :]) | ((other[:, None] == own[None, :]) & (j[:, None] < i[None, :]))
        rank += tl.sum((before & (j < length)[:, None]).to(tl.int32), 0)
    tl.store(order + rank, i, exists)
    survives = exists & (rank >= removed)
    slot = tl.cumsum(survives.to(tl.int32), 0) - 1
    tl.store(keep + last + slot, i.to(tl.int64), survives)
    tl.debug_barrier()

    # Match: the most similar target of each source.
    r = tl.arange(0, RP)
    is_source = r < removed
    source = tl.load(order + r, is_source, 0)
    tl.store(gone + image * removed + r, source.to(tl.int64), is_source)
    if MATCH:
        nearest = tl.zeros((RP,), tl.int32)
        best = tl.full((RP,), float("-inf"), tl.float32)
        for m0 in range(0, targets, BLOCK):
            m = m0 + block
            is_target = m < targets
            target = tl.load(order + removed + m, is_target, 0)
            similarity = tl.zeros((RP, BLOCK), tl.float32)
            square = tl.zeros((BLOCK,), tl.float32)
            for c0 in range(0, channels, CK):
                c = c0 + tl.arange(0, CK)
                a = _features(hidden, residual, first + source, channels, c, is_source, HIDDEN, RESIDUAL)
                b = _features(hidden, residual, first + target, channels, c, is_target, HIDDEN, RESIDUAL)
                similarity = tl.dot(a, tl.trans(b), similarity, input_precision=PRECISION)
                square += tl.sum(b * b, 1)
            similarity = similarity / tl.maximum(tl.sqrt(square), 1e-12)[None, :]
            similarity = tl.where(is_target[None, :], similarity, float("-inf"))
            value, place = tl.max(similarity, 1, return_indices=True, return_indices_tie_break_left=True)
            nearest = tl.where(value > best, m0 + place, nearest)
            best = tl.maximum(value, best)
        target = tl.load(order + removed + nearest, is_source, 0)
        tl.store(into + r, target, is_source)
        tl.debug_barrier()

    # Merge: the weight of each token in what it becomes part of.
    mass = tl.load(size + first + i, exists, 1.0) if SIZE else tl.full((LP,), 1.0, tl.float32)
    total = mass
    if MATCH:
        source_mass = tl.load(size + first + source, is_source, 1.0) if SIZE else tl.full((RP,), 1.0, tl.float32)
        target_slot = target
        source_total = tl.load(size + first + target, is_source, 1.0) if SIZE else tl.full((RP,), 1.0, tl.float32)
        for k in range(removed):
            gone_k, into_k = tl.load(order + k), tl.load(into + k)
            mass_k = tl.load(size + first + gone_k) if SIZE else 1.0
            total += tl.where(i == into_k, mass_k, 0)
            source_total += tl.where(target == into_k, mass_k, 0)
            target_slot -= (gone_k < target).to(tl.int32)
        tl.store(dest + first + source, target_slot.to(tl.int64), is_source)
        tl.store(weight + first + source, source_mass / source_total, is_source)
    else:
        tl.store(dest + first + source, tl.full((RP,), -1, tl.int64), is_source)
        tl.store(weight + first + source, tl.zeros((RP,), tl.float32), is_source)
    tl.store(dest + first + i, slot.to(tl.int64), survives)
    tl.store(weight + first + i, mass / total, survives)


def asymmetric_plan(
    score: Tensor,
    special: Tensor,
    size: Tensor | None,
    hidden: Tensor | None,
    residual: Tensor | None,
    removed: int,
    targets: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ``removed`` least important tokens merge into the most similar of the ``targets`` next ones, order kept.

    Args:
        score: (B, L) float32, finite; L at most ``MAX_LENGTH``, ``removed`` at most ``MAX_REMOVED``.
        special: (B, S) positions of tokens that neither go nor take others in.
        size: (B, L) weights of the tokens in a mean; ``None`` for equal weights.
        hidden, residual: (B, L, C); tokens are compared by the cosine of the sum of those given. With neither, tokens
            are dropped.

    Returns:
        dest, weight, keep and gone of ``mtr_lab.ops.apply_plan``.
    """
    images, length = score.shape
    device, match = score.device, hidden is not None or residual is not None
    features = residual if hidden is None else hidden
    order, into = (torch.empty(images, n, dtype=torch.int32, device=device) for n in (length, removed))
    dest, keep, gone = (
        torch.empty(images, n, dtype=torch.int64, device=device) for n in (length, length - removed, removed)
    )
    weight = torch.empty_like(score, dtype=torch.float32)
    _plan[(images,)](
        score.float().contiguous(), special.contiguous(), score if size is None else size.contiguous(),
        score if hidden is None else hidden.contiguous(), score if residual is None else residual.contiguous(),
        order, into, dest, weight, keep, gone, length, removed, targets, special.shape[1],
        features.shape[2] if features is not None else 1,
        MATCH=match, SIZE=size is not None, HIDDEN=hidden is not None, RESIDUAL=residual is not None,
        PRECISION="ieee" if INTERPRETED else "tf32x3", LP=max(16, triton.next_power_of_2(length)),
        RP=max(16, triton.next_power_of_2(removed)), BLOCK=64,
    )  # fmt: skip
    return dest, weight, keep, gone


@triton.jit(do_not_specialize=["length", "removed", "specials"])
def _carry(index, size, special, dest, keep, gone, new_index, new_size, new_special, length, removed, specials,
           M: tl.constexpr, S: tl.constexpr):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    first, kept = image * length, length - removed
    j = tl.arange(0, M)
    there = j < kept
    i = tl.load(keep + image * kept + j, there, 0)
    tl.store(new_index + image * kept + j, tl.load(index + first + i, there, 0), there)
    total = tl.load(size + first + i, there, 0)
    for k in range(removed):
        other = tl.load(gone + image * removed + k)
        total += tl.where(j == tl.load(dest + first + other), tl.load(size + first + other), 0)
    tl.store(new_size + image * kept + j, total, there)
    s = tl.arange(0, S)
    place = tl.load(special + image * specials + s, s < specials, 0)
    tl.store(new_special + image * specials + s, tl.load(dest + first + place, s < specials, 0), s < specials)


def carry(
    index: Tensor, size: Tensor, special: Tensor, dest: Tensor, keep: Tensor, gone: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The original index, size and special positions of the survivors: (B, M), (B, M), (B, S)."""
    images, length = index.shape
    kept = keep.shape[1]
    new_index, new_size, new_special = (
        index.new_empty(images, kept),
        size.new_empty(images, kept),
        special.new_empty(special.shape),
    )
    _carry[(images,)](
        *(t.contiguous() for t in (index, size, special, dest, keep, gone)), new_index, new_size, new_special,
        length, length - kept, special.shape[1], M=triton.next_power_of_2(kept),
        S=triton.next_power_of_2(max(special.shape[1], 1)), num_warps=4,
    )  # fmt: skip
    return new_index, new_size, new_special
