"""A whole reduction decision in Triton: rank, group, match, merge and the survivors' order.

One launch with one program an image for some hundred tokens, where latency is what costs; four launches with several
programs an image beyond that, for the same steps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.launch import registers

MAX_LENGTH = 8192
MAX_REMOVED = 1024
ALONE = (512, 64)
"""Tokens and removed tokens up to which one program decides on an image."""
THREADS = {"num_warps": 8} | registers(128)
"""Of a program: two of them fit a multiprocessor."""
RUN = 512  # tokens that are sorted by one program


@triton.jit
def _keys(score, special, i, length, SPECIALS: tl.constexpr):
    """Distinct integers in the order in which tokens go: the least important first, of equals the earlier."""
    bits = (tl.load(score + i, i < length, 0) + 0.0).to(tl.int32, bitcast=True)  # of two zeros the positive
    key = tl.where(i < length, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    for s in tl.static_range(SPECIALS):
        key = tl.where(i == tl.load(special + s).to(tl.int32), 0x7FFFFFFF, key)  # the protected last
    return (key.to(tl.int64) << 32) | i


@triton.jit
def _features(hidden, residual, row, there, channels, c, HIDDEN: tl.constexpr, RESIDUAL: tl.constexpr):
    at = row[:, None] * channels + c[None, :]
    there = there[:, None] & (c < channels)[None, :]
    x = tl.load((hidden if HIDDEN else residual) + at, there, 0).to(tl.float32)
    if HIDDEN and RESIDUAL:
        x += tl.load(residual + at, there, 0).to(tl.float32)
    return x


@triton.jit
def _halves(x):
    """The bits of float32 numbers that matrix units read, and what they leave."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _nearest(hidden, residual, order, image, r, begin, end, length, removed, channels, HIDDEN: tl.constexpr,
             RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, CK: tl.constexpr):  # fmt: skip
    """The most similar of the targets begin to end for each source r, as integers of which the largest wins."""
    first = image * length
    order += first
    is_source = r < removed
    source = first + tl.load(order + r, is_source, 0)
    best = tl.full(r.shape, -(2**63), tl.int64)
    for m0 in range(begin, end, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        is_target = m < end
        target = first + tl.load(order + removed + m, is_target, 0)
        similarity = tl.zeros((BLOCK, r.shape[0]), tl.float32)
        square = tl.zeros((BLOCK,), tl.float32)
        for c0 in range(0, channels, CK):
            c = c0 + tl.arange(0, CK)
            a = _features(hidden, residual, target, is_target, channels, c, HIDDEN, RESIDUAL)
            b = _features(hidden, residual, source, is_source, channels, c, HIDDEN, RESIDUAL)
            square += tl.sum(a * a, 1)
            a, a_rest = _halves(a)
            b, b_rest = _halves(tl.trans(b))
            similarity = tl.dot(a_rest, b, similarity, input_precision="tf32")
            similarity = tl.dot(a, b_rest, similarity, input_precision="tf32")
            similarity = tl.dot(a, b, similarity, input_precision="tf32")
        similarity = similarity / tl.maximum(tl.sqrt(square), 1e-12)[:, None] + 0.0
        bits = similarity.to(tl.int32, bitcast=True)
        key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32 | (0x7FFFFFFF - m)[:, None]
        best = tl.maximum(best, tl.max(tl.where(is_target[:, None], key, -(2**63)), 0))
    return best


@triton.jit
def _removed(order, best, size, k, removed, MATCH: tl.constexpr):
    """The removed tokens k, into which tokens they merge (-1: none), and how many original tokens they stand for."""
    there = k < removed
    source = tl.load(order + k, there, 0x7FFFFFFF)
    target = tl.where(there, -1, 0x7FFFFFFF)
    if MATCH:
        place = 0x7FFFFFFF - (tl.load(best + k, there, 0x7FFFFFFF) & 0x7FFFFFFF).to(tl.int32)
        target = tl.load(order + removed + place, there, 0x7FFFFFFF)
    return source, target, tl.load(size + source, there, 0)


@triton.jit
def _survivors(order, best, index, size, special, dest, weight, keep, start, new_index, new_size, new_special, image, i,
               length, removed, SPECIALS: tl.constexpr, MATCH: tl.constexpr, BY_SIZE: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """Write where the survivors among the tokens i go, and what they are made of."""
    first, kept = image * length, length - removed
    order, best, size = order + first, best + image * removed, size + first
    own = tl.load(size + i, i < length, 1)
    slot, gone, begin, gained, total = i, i * 0, i * 0, i * 0.0, own
    for k in range(0, removed, BLOCK):
        source, target, mass = _removed(order, best, size, k + tl.arange(0, BLOCK), removed, MATCH)
        source, target = source[:, None], target[:, None]
        slot -= tl.sum((source < i[None, :]).to(tl.int32), 0)
        gone += tl.sum((source == i[None, :]).to(tl.int32), 0)
        begin += tl.sum((target < i[None, :]).to(tl.int32), 0)
        gained += tl.sum((target == i[None, :]).to(tl.float32), 0)
        total += tl.sum(tl.where(target == i[None, :], mass[:, None], 0), 0)
    survives = (i < length) & (gone == 0)
    to = image * kept + slot
    tl.store(dest + first + i, slot.to(tl.int64), survives)
    tl.store(weight + first + i, tl.div_rn(own, total) if BY_SIZE else tl.div_rn(1.0, 1.0 + gained), survives)
    tl.store(keep + to, i.to(tl.int64), survives)
    tl.store(new_index + to, tl.load(index + first + i, survives, 0), survives)
    tl.store(new_size + to, total, survives)
    start += image * (kept + 1)
    tl.store(start + slot, begin.to(tl.int64), survives)
    tl.store(start + kept + i * 0, removed.to(tl.int64), i == length - 1)
    for s in tl.static_range(SPECIALS):
        protected = i == tl.load(special + image * SPECIALS + s).to(tl.int32)
        tl.store(new_special + image * SPECIALS + s + i * 0, slot.to(tl.int64), protected)


@triton.jit
def _sources(order, best, size, dest, weight, gone, image, r, length, removed, MATCH: tl.constexpr,
             BY_SIZE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Write where the removed tokens r go, and list them by it."""
    first = image * length
    order, best, size = order + first, best + image * removed, size + first
    own, into, own_mass = _removed(order, best, size, r, removed, MATCH)
    there = r < removed
    merges = there & (into >= 0)
    slot, place, sharing, total = into, r * 0, r * 0.0, tl.load(size + into, merges, 1)
    for k0 in range(0, removed, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        source, target, mass = _removed(order, best, size, k, removed, MATCH)
        source, target = source[:, None], target[:, None]
        same = target == into[None, :]
        slot -= tl.sum((source < into[None, :]).to(tl.int32), 0)
        place += tl.sum(((target < into[None, :]) | (same & (k[:, None] < r[None, :]))).to(tl.int32), 0)
        sharing += tl.sum(same.to(tl.float32), 0)
        total += tl.sum(tl.where(same, mass[:, None], 0), 0)
    share = tl.div_rn(own_mass, total) if BY_SIZE else tl.div_rn(1.0, 1.0 + sharing)
    tl.store(gone + image * removed + place, own.to(tl.int64), there)
    tl.store(dest + first + own, tl.where(merges, slot, -1).to(tl.int64), there)
    tl.store(weight + first + own, tl.where(merges, share, 0), there)


@triton.jit(do_not_specialize=["length", "removed", "targets"])
def _decide(score, index, size, special, hidden, residual, order, best, dest, weight, keep, gone, start, new_index,
            new_size, new_special, length, removed, targets, channels, SPECIALS: tl.constexpr, MATCH: tl.constexpr,
            BY_SIZE: tl.constexpr, HIDDEN: tl.constexpr, RESIDUAL: tl.constexpr, LP: tl.constexpr, RP: tl.constexpr,
            BLOCK: tl.constexpr, CK: tl.constexpr):  # fmt: skip
    """All of a decision on one image in one program."""
    image = tl.program_id(0).to(tl.int64)
    i, r = tl.arange(0, LP), tl.arange(0, RP)
    first = image * length
    ranked = tl.sort(_keys(score + first, special + image * SPECIALS, i, length, SPECIALS))
    tl.store(order + first + i, (ranked & 0x7FFFFFFF).to(tl.int32), i < length)
    tl.debug_barrier()
    if MATCH:
        key = _nearest(hidden, residual, order, image, r, 0, targets, length, removed, channels, HIDDEN, RESIDUAL,
                       BLOCK, CK)  # fmt: skip
        tl.store(best + image * removed + r, key, r < removed)
        tl.debug_barrier()
    _survivors(order, best, index, size, special, dest, weight, keep, start, new_index, new_size, new_special, image, i,
               length, removed, SPECIALS, MATCH, BY_SIZE, 16)  # fmt: skip
    _sources(order, best, size, dest, weight, gone, image, r, length, removed, MATCH, BY_SIZE, 16)


@triton.jit(do_not_specialize=["length", "removed"])
def _sort_block(score, special, keys, best, length, removed, SPECIALS: tl.constexpr, RUN: tl.constexpr):
    """Sort the keys of some tokens among themselves."""
    image, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * RUN + tl.arange(0, RUN)
    ranked = tl.sort(_keys(score + image * length, special + image * SPECIALS, i, length, SPECIALS))
    tl.store(keys + image * length + i, ranked, i < length)
    tl.store(best + image * removed + i, tl.full((RUN,), -(2**63), tl.int64), i < removed)


@triton.jit(do_not_specialize=["length"])
def _rank_block(keys, order, length, RUN: tl.constexpr, LP: tl.constexpr):
    """Write some tokens to ``order`` where they stand in it: after as many as every sorted run has that go before."""
    image, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * LP + tl.arange(0, LP)
    keys, order = keys + image * length, order + image * length
    own = tl.load(keys + i, i < length, 0)
    rank = i * 0
    for run in range(0, length, RUN):
        before = i * 0
        half = RUN // 2
        while half > 0:
            at = run + before + half - 1
            before += tl.where(tl.load(keys + at, at < length, 2**63 - 1) < own, half, 0)
            half //= 2
        at = run + before
        rank += before + (tl.load(keys + at, at < length, 2**63 - 1) < own).to(tl.int32)
    tl.store(order + rank, (own & 0x7FFFFFFF).to(tl.int32), i < length)


@triton.jit(do_not_specialize=["length", "removed", "targets"])
def _match_block(hidden, residual, order, best, length, removed, targets, channels, HIDDEN: tl.constexpr,
                 RESIDUAL: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr, CK: tl.constexpr):  # fmt: skip
    image, r = tl.program_id(0).to(tl.int64), tl.program_id(1) * RP + tl.arange(0, RP)
    begin = tl.program_id(2) * BLOCK
    key = _nearest(hidden, residual, order, image, r, begin, tl.minimum(begin + BLOCK, targets), length, removed,
                   channels, HIDDEN, RESIDUAL, BLOCK, CK)  # fmt: skip
    tl.atomic_max(best + image * removed + r, key, r < removed)


@triton.jit(do_not_specialize=["length", "removed"])
def _merge_block(order, best, index, size, special, dest, weight, keep, gone, start, new_index, new_size, new_special,
                 length, removed, SPECIALS: tl.constexpr, MATCH: tl.constexpr, BY_SIZE: tl.constexpr,
                 LP: tl.constexpr):  # fmt: skip
    image, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * LP + tl.arange(0, LP)
    _survivors(order, best, index, size, special, dest, weight, keep, start, new_index, new_size, new_special, image, i,
               length, removed, SPECIALS, MATCH, BY_SIZE, 16)  # fmt: skip
    if tl.program_id(1) * LP < removed:
        _sources(order, best, size, dest, weight, gone, image, i, length, removed, MATCH, BY_SIZE, 16)


def asymmetric_plan(
    score: Tensor,
    index: Tensor,
    size: Tensor,
    special: Tensor,
    hidden: Tensor | None,
    residual: Tensor | None,
    removed: int,
    targets: int,
    by_size: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The contract of ``mtr_lab.ops.asymmetric_plan``.

    Returns:
        dest, weight, keep, gone and start of a ``Plan``; index, size and special positions of the survivors.
    """
    images, length = score.shape
    kept, specials = length - removed, special.shape[1]
    order, best = score.new_empty(images, length, dtype=torch.int32), special.new_empty(images, removed)
    dest, keep, gone, start, new_index = (special.new_empty(images, n) for n in (length, kept, removed, kept + 1, kept))
    weight, new_size = score.new_empty(images, length, dtype=torch.float32), size.new_empty(images, kept)
    new_special = special.new_empty(special.shape)
    found = dest, weight, keep, gone, start, new_index, new_size, new_special
    score, index, size, special = (t.contiguous() for t in (score.float(), index, size, special))

    features = residual if hidden is None else hidden
    channels = 1 if features is None else features.shape[2]
    streams = [score if t is None else t.contiguous() for t in (hidden, residual)]
    matching = {"HIDDEN": hidden is not None, "RESIDUAL": residual is not None, "CK": 32}
    merging = {"MATCH": features is not None, "BY_SIZE": by_size}
    if length <= ALONE[0] and removed <= ALONE[1]:
        _decide[(images,)](
            score, index, size, special, *streams, order, best, *found, length, removed, targets, channels, specials,
            **matching, **merging, LP=max(16, triton.next_power_of_2(length)),
            RP=max(16, triton.next_power_of_2(removed)), BLOCK=128 if removed <= 32 and targets > 64 else 64, **THREADS,
        )  # fmt: skip
        return found
    blocks = (images, triton.cdiv(length, 128))
    keys = special.new_empty(images, length)
    runs = (images, triton.cdiv(length, RUN))
    _sort_block[runs](score, special, keys, best, length, removed, specials, RUN=RUN, **THREADS)
    _rank_block[blocks](keys, order, length, RUN=RUN, LP=128, num_warps=4)
    if features is not None:
        _match_block[(images, triton.cdiv(removed, 64), triton.cdiv(targets, 64))](
            *streams, order, best, length, removed, targets, channels, **matching, RP=64, BLOCK=64, **THREADS
        )
    _merge_block[blocks](
        order, best, index, size, special, *found, length, removed, specials, **merging, LP=128, num_warps=4
    )
    return found
