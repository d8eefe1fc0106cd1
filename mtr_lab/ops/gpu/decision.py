"""The asymmetric reduction decision in Triton: a launch each to rank the tokens, match them and write the plan."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.decision_inputs import DecisionInputs
from mtr_lab.ops.gpu.occupancy import STAGES, num_sms, on_its_device

MAX_LENGTH = 16384
MAX_REMOVED = 2048
POSITIONS = tl.constexpr(2)
FEW = 16, 128, 4  # targets, channels at a time and warps of a program that matches them, where few programs run
RUN = 512  # tokens that one program sorts; the sorted runs of longer sequences are merged by another launch


@triton.jit
def _keys(terms, special, i, length, step_term, step_token, scale, TERMS: tl.constexpr, SPECIALS: tl.constexpr):
    """Distinct integers that sort tokens by their score, equal scores by position, special tokens last."""
    score = tl.load(terms + i * step_token, i < length, 0).to(tl.float32)
    for k in tl.static_range(1, TERMS):
        score += tl.load(terms + k * step_term + i * step_token, i < length, 0).to(tl.float32)
    score = tl.div_rn(score, scale)
    score = tl.where(score == score, score, 0) + 0.0  # NaN becomes 0, and -0 becomes +0
    score = tl.minimum(tl.maximum(score, -3.4028234663852886e38), 3.4028234663852886e38)
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(i < length, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    for s in tl.static_range(SPECIALS):
        key = tl.where(i == tl.load(special + s).to(tl.int32), 0x7FFFFFFF, key)  # last
    return (key.to(tl.int64) << 32) | i


@triton.jit
def _features(hidden, residual, row, mask, channels, c, HIDDEN: tl.constexpr, RESIDUAL: tl.constexpr):
    at = row[:, None] * channels + c[None, :]
    mask = mask[:, None] & (c < channels)[None, :]
    x = tl.load((hidden if HIDDEN else residual) + at, mask, 0).to(tl.float32)
    if HIDDEN and RESIDUAL:
        x += tl.load(residual + at, mask, 0).to(tl.float32)
    return x


@triton.jit
def _halves(x):
    """x as the sum of two float32 numbers: the bits that a TF32 product reads, and the rest."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _load_removed(order, best, size, k, num_removed, MATCH: tl.constexpr):
    """The positions of the removed tokens k, those of their merge targets (-1 to drop) and their sizes.

    ``best`` holds keys of the places of targets in ``order``, or positions of targets if ``MATCH`` is ``POSITIONS``.
    """
    mask = k < num_removed
    source = tl.load(order + k, mask, 0x7FFFFFFF)
    target = tl.where(mask, -1, 0x7FFFFFFF)
    if MATCH == POSITIONS:
        target = tl.load(best + k, mask, 0x7FFFFFFF).to(tl.int32)
    elif MATCH:
        place = 0x7FFFFFFF - (tl.load(best + k, mask, 0x7FFFFFFF) & 0x7FFFFFFF).to(tl.int32)
        target = tl.load(order + num_removed + place, mask, 0x7FFFFFFF)
    return source, target, tl.load(size + source, mask, 0)


@triton.jit
def _survivors(order, best, index, size, special, dest, weight, keep, offsets, new_index, new_size, new_special, image,
               i, length, num_removed, SPECIALS: tl.constexpr, MATCH: tl.constexpr, BY_SIZE: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """Write the plan and the new metadata of the survivors among the tokens i."""
    first, kept = image * length, length - num_removed
    order, best = order + first, best + image * num_removed
    own = tl.load(size + i, i < length, 1)
    slot, is_removed, begin, merged, total = i, i * 0, i * 0, i * 0.0, own
    for k in range(0, num_removed, BLOCK):
        source, target, mass = _load_removed(order, best, size, k + tl.arange(0, BLOCK), num_removed, MATCH)
        source, target = source[:, None], target[:, None]
        slot -= tl.sum((source < i[None, :]).to(tl.int32), 0)
        is_removed += tl.sum((source == i[None, :]).to(tl.int32), 0)
        begin += tl.sum((target < i[None, :]).to(tl.int32), 0)
        merged += tl.sum((target == i[None, :]).to(tl.float32), 0)
        total += tl.sum(tl.where(target == i[None, :], mass[:, None], 0), 0)
    survives = (i < length) & (is_removed == 0)
    to = image * kept + slot
    tl.store(dest + first + i, slot.to(tl.int64), survives)
    tl.store(weight + first + i, tl.div_rn(own, total) if BY_SIZE else tl.div_rn(1.0, 1.0 + merged), survives)
    tl.store(keep + to, i.to(tl.int64), survives)
    tl.store(new_index + to, tl.load(index + i, survives, 0), survives)
    tl.store(new_size + to, total, survives)
    offsets += image * (kept + 1)
    tl.store(offsets + slot, begin.to(tl.int64), survives)
    tl.store(offsets + kept + i * 0, num_removed.to(tl.int64), i == length - 1)
    for s in tl.static_range(SPECIALS):
        is_special = i == tl.load(special + image * SPECIALS + s).to(tl.int32)
        tl.store(new_special + image * SPECIALS + s + i * 0, slot.to(tl.int64), is_special)


@triton.jit
def _sources(order, best, size, dest, weight, removed, image, r, length, num_removed, MATCH: tl.constexpr,
             BY_SIZE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Write the plan of the removed tokens r, and list them by destination."""
    first = image * length
    order, best = order + first, best + image * num_removed
    own, into, own_mass = _load_removed(order, best, size, r, num_removed, MATCH)
    mask = r < num_removed
    merges = mask & (into >= 0)
    slot, place, sharing, total = into, r * 0, r * 0.0, tl.load(size + into, merges, 1)
    for k0 in range(0, num_removed, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        source, target, mass = _load_removed(order, best, size, k, num_removed, MATCH)
        source, target = source[:, None], target[:, None]
        same = target == into[None, :]
        slot -= tl.sum((source < into[None, :]).to(tl.int32), 0)
        place += tl.sum(((target < into[None, :]) | (same & (k[:, None] < r[None, :]))).to(tl.int32), 0)
        sharing += tl.sum(same.to(tl.float32), 0)
        total += tl.sum(tl.where(same, mass[:, None], 0), 0)
    share = tl.div_rn(own_mass, total) if BY_SIZE else tl.div_rn(1.0, 1.0 + sharing)
    tl.store(removed + image * num_removed + place, own.to(tl.int64), mask)
    tl.store(dest + first + own, tl.where(merges, slot, -1).to(tl.int64), mask)
    tl.store(weight + first + own, tl.where(merges, share, 0), mask)


@triton.jit(do_not_specialize=["length", "num_removed", "step_image", "step_term"])
def _sort_block(terms, special, keys, order, best, length, num_removed, step_image, step_term, step_token, scale,
                TERMS: tl.constexpr, SPECIALS: tl.constexpr, WHOLE: tl.constexpr, LP: tl.constexpr):  # fmt: skip
    """Sort LP tokens: write their positions if they are a whole image, else their sorted keys, a run."""
    image, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * LP + tl.arange(0, LP)
    own = _keys(terms + image * step_image, special + image * SPECIALS, i, length, step_term, step_token, scale, TERMS,
                SPECIALS)  # fmt: skip
    ranked = tl.sort(own)
    if WHOLE:
        tl.store(order + image * length + i, (ranked & 0x7FFFFFFF).to(tl.int32), i < length)
    else:
        tl.store(keys + image * length + i, ranked, i < length)
    tl.store(best + image * num_removed + i, tl.full((LP,), -(2**63), tl.int64), i < num_removed)


@triton.jit(do_not_specialize=["length"])
def _rank_block(keys, order, length, RUN: tl.constexpr, LP: tl.constexpr):
    """Merge the sorted runs of an image: a token's rank is the number of smaller keys in all runs."""
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


@triton.jit(do_not_specialize=["length", "num_removed", "targets"])
def _match_block(hidden, residual, order, best, length, num_removed, targets, channels, HIDDEN: tl.constexpr,
                 RESIDUAL: tl.constexpr, RP: tl.constexpr, TP: tl.constexpr, CP: tl.constexpr):  # fmt: skip
    """Find the most similar of TP targets for RP sources, and combine it with the other programs' by an atomic maximum.

    Keys are integers: the similarity in the high bits, then the target, the first of equals largest.
    """
    image = tl.program_id(0).to(tl.int64)
    r, m = tl.program_id(1) * RP + tl.arange(0, RP), tl.program_id(2) * TP + tl.arange(0, TP)
    is_source, is_target = r < num_removed, m < targets
    first = image * length
    source = first + tl.load(order + first + r, is_source, 0)
    target = first + tl.load(order + first + num_removed + m, is_target, 0)
    similarity = tl.zeros((RP, TP), tl.float32)
    square = tl.zeros((TP,), tl.float32)
    for c0 in tl.range(0, channels, CP, num_stages=STAGES):
        c = c0 + tl.arange(0, CP)
        a = _features(hidden, residual, source, is_source, channels, c, HIDDEN, RESIDUAL)
        b = _features(hidden, residual, target, is_target, channels, c, HIDDEN, RESIDUAL)
        square += tl.sum(b * b, 1)
        a, a_rest = _halves(a)
        b, b_rest = _halves(tl.trans(b))
        similarity = tl.dot(a_rest, b, similarity, input_precision="tf32")
        similarity = tl.dot(a, b_rest, similarity, input_precision="tf32")
        similarity = tl.dot(a, b, similarity, input_precision="tf32")
    similarity = similarity / tl.maximum(tl.sqrt(square), 1e-12)[None, :] + 0.0  # -0 becomes +0
    bits = similarity.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32 | (0x7FFFFFFF - m)[None, :]
    key = tl.max(tl.where(is_target[None, :], key, -(2**63)), 1)
    tl.atomic_max(best + image * num_removed + r, key, is_source)


@triton.jit(do_not_specialize=["length", "num_removed", "step_index", "step_size"])
def _merge_block(order, best, index, size, special, dest, weight, keep, removed, offsets, new_index, new_size,
                 new_special, length, num_removed, step_index, step_size, SPECIALS: tl.constexpr, MATCH: tl.constexpr,
                 BY_SIZE: tl.constexpr, LP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    image, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * LP + tl.arange(0, LP)
    index, size = index + image * step_index, size + image * step_size
    _survivors(order, best, index, size, special, dest, weight, keep, offsets, new_index, new_size, new_special, image,
               i, length, num_removed, SPECIALS, MATCH, BY_SIZE, BLOCK)  # fmt: skip
    if tl.program_id(1) * LP < num_removed:
        _sources(order, best, size, dest, weight, removed, image, i, length, num_removed, MATCH, BY_SIZE, BLOCK)


@on_its_device
def asymmetric_plan(inputs: DecisionInputs) -> tuple[Tensor, ...]:
    """The contract of ``mtr_lab.ops.asymmetric_plan``.

    Returns:
        dest, weight, keep, removed and offsets of a ``Plan``; index, size and special positions of the survivors.
    """
    terms, scale, index, size, special, hidden, residual, num_removed, targets, by_size = inputs
    images, _, length = terms.shape
    order, best = special.new_empty(images, length, dtype=torch.int32), special.new_empty(images, num_removed)
    special = special.contiguous()

    features = residual if hidden is None else hidden
    streams = [size if t is None else t.contiguous() for t in (hidden, residual)]
    ranking = {"TERMS": terms.shape[1], "SPECIALS": special.shape[1]}
    whole = length <= RUN
    keys = best if whole else special.new_empty(images, length)
    _sort_block[images, triton.cdiv(length, RUN)](
        terms, special, keys, order, best, length, num_removed, *terms.stride(), scale, **ranking, WHOLE=whole,
        LP=triton.next_power_of_2(length) if whole else RUN, num_warps=8,
    )  # fmt: skip
    if not whole:
        _rank_block[images, triton.cdiv(length, 128)](keys, order, length, RUN=RUN, LP=128)
    if features is not None:
        # Large tiles reuse what they load; with few removed tokens, many small programs hide latency better.
        rows, columns, step, warps = max(16, triton.next_power_of_2(num_removed)), 32, 32, 2
        if num_removed > 64:
            rows, columns, warps = 64, 64, 4
        elif images * triton.cdiv(targets, columns) <= num_sms(terms.device):  # one wave: read more at a time
            columns, step, warps = FEW
        _match_block[images, triton.cdiv(num_removed, rows), triton.cdiv(targets, columns)](
            *streams, order, best, length, num_removed, targets, features.shape[2], HIDDEN=hidden is not None,
            RESIDUAL=residual is not None, RP=rows, TP=columns, CP=step, num_warps=warps,
        )  # fmt: skip
    return merge(order, best, index, size, special, num_removed, match=features is not None, by_size=by_size)


def merge(
    order: Tensor,
    best: Tensor,
    index: Tensor,
    size: Tensor,
    special: Tensor,
    num_removed: int,
    *,
    match: bool | tl.constexpr,
    by_size: bool,
) -> tuple[Tensor, ...]:
    """Write the plan of removed tokens and their targets, ``order`` (B, L) and ``best`` (B, num_removed).

    Returns:
        dest, weight, keep, removed and offsets of a ``Plan``; index, size and special positions of the survivors.
    """
    images, length = order.shape
    kept = length - num_removed
    lengths = length, kept, num_removed, kept + 1, kept
    dest, keep, removed, offsets, new_index = (special.new_empty(images, n) for n in lengths)
    weight, new_size = size.new_empty(images, length, dtype=torch.float32), size.new_empty(images, kept)
    result = dest, weight, keep, removed, offsets, new_index, new_size, torch.empty_like(special)
    # Before the first reduction all images share one row, expanded.
    index, size = (t if t.stride(1) == 1 else t.contiguous() for t in (index, size))
    tokens = 64
    _merge_block[images, triton.cdiv(length, tokens)](
        order, best, index, size, special, *result, length, num_removed, index.stride(0), size.stride(0),
        SPECIALS=special.shape[1], MATCH=match, BY_SIZE=by_size, LP=tokens,
        BLOCK=min(max(16, triton.next_power_of_2(num_removed)), 64), num_warps=2,
    )  # fmt: skip
    return result
