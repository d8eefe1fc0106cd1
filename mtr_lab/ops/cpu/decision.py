"""The decisions of a reduction: scores, nearest tokens, plans."""

import numba
import numpy as np
import torch
from torch import Tensor

from mtr_lab.ops.cpu.arrays import NO_FACTOR, array
from mtr_lab.ops.cpu.compiled import jit
from mtr_lab.ops.cpu.formulas import dot, f32
from mtr_lab.ops.cpu.threads import run
from mtr_lab.ops.decision_inputs import DecisionInputs, NeighbourInputs, stream_of


def neighbour_plan(inputs: NeighbourInputs) -> tuple[Tensor, ...]:
    """The contract of ``neighbour_plan_reference``, for streams on the CPU that are not float64."""
    index, size, special, weight, hidden, residual, remove, by_size, axes = inputs
    features = stream_of(hidden, residual)
    assert features is not None
    result = _empty_plan(index, size, special, remove)
    run(
        _neighbour_plan,
        *(t.contiguous().numpy() for t in (index, size, special)),
        NO_FACTOR if weight is None else array(weight),
        array(features),
        by_size,
        np.array(axes, dtype=np.int64),
        *(t.numpy() for t in result),
        share=len(index),
    )
    return result


def asymmetric_plan(inputs: DecisionInputs) -> tuple[Tensor, ...]:
    """The result of the operator ``mtr_lab::asymmetric_plan``, for float32 streams on the CPU, one at least."""
    terms, scale, index, size, special, hidden, residual, remove, targets, by_size = inputs
    features = stream_of(hidden, residual)
    assert features is not None
    special = special.long()  # an empty list makes a tensor of floats
    result = _empty_plan(index, size, special, remove)
    run(
        _asymmetric_plan, array(terms), np.float32(scale),
        *(t.contiguous().numpy() for t in (index, size, special)), array(features), targets,
        by_size, *(t.numpy() for t in result), share=len(index),
    )  # fmt: skip
    return result


def _empty_plan(index: Tensor, size: Tensor, special: Tensor, remove: int) -> tuple[Tensor, ...]:
    """Of the fields of a plan with offsets and of its metadata: memory for what the kernels write."""
    images, length = index.shape
    kept = length - remove
    dest, keep, removed, offsets, survivors = (
        index.new_empty(images, n) for n in (length, kept, remove, kept + 1, kept)
    )
    share, sizes = size.new_empty(images, length), size.new_empty(images, kept)
    return dest, share, keep, removed, offsets, survivors, sizes, torch.empty_like(special)


@jit(parallel=True)
def _neighbour_plan(index, size, special, weight, features, by_size, axes,
                   dest, share, keep, removed, offsets, survivors, sizes, places):  # fmt: skip
    """``neighbour_plan``: the results are written to the arrays of the second line.

    ``features`` are (B, L, C). ``weight`` is empty for the most similar tokens first.
    """
    images, length, channels = features.shape
    memory = features.reshape(-1)
    for image in numba.prange(images):
        turn, place = _turns(index[image], special[image])
        norm = np.empty(length, f32)
        row = image * length * channels
        for i in range(length):
            at = row + i * channels
            norm[i] = max(np.sqrt(dot(memory, at, at, channels)), f32(1e-12))
        token = np.full(place[length - 1] + 2, -1, np.int64)  # at each place of the grid: the target there
        sources = 0
        for i in range(length):
            sources += turn[i] >= 0 and turn[i] % 2 == 0
            if turn[i] >= 0 and turn[i] % 2 == 1:
                token[place[i]] = i
        source, into, cost = np.empty(sources, np.int64), np.empty(sources, np.int64), np.empty(sources, f32)
        first = last = -1  # the next targets before and behind
        for i in range(length):
            if turn[i] < 0:
                continue
            if turn[i] % 2 == 1:
                first = i
                continue
            k = turn[i] // 2
            best, similarity = _nearest_neighbour(memory, row, channels, norm, i, place[i], token, axes)
            distance = f32(np.inf) if best < 0 else -similarity
            if best >= 0 and weight.shape[0] > 0:
                distance = weight[image, i] * (f32(1) - similarity)
            if best < 0:
                last = i + 1
                while last < length and (turn[last] < 0 or turn[last] % 2 == 0):
                    last += 1
                best = (
                    first
                    if last == length or (first >= 0 and place[i] - place[first] <= place[last] - place[i])
                    else last
                )
            source[k], into[k], cost[k] = i, best, distance if distance == distance else f32(np.inf)
        _least_first(cost, source, into)
        _write_plan(source[: removed.shape[1]], into, index[image], size[image], special[image], by_size, dest[image],
                    share[image], keep[image], removed[image], offsets[image], survivors[image], sizes[image],
                    places[image])  # fmt: skip


@jit(parallel=True)
def _asymmetric_plan(terms, scale, index, size, special, features, targets, by_size,
                    dest, share, keep, removed, offsets, survivors, sizes, places):  # fmt: skip
    """``asymmetric_plan``, for features (B, L, C): the results are written to the arrays of the second line."""
    images, length, channels = features.shape
    remove, memory, most = removed.shape[1], features.reshape(-1), np.finfo(f32).max
    for image in numba.prange(images):
        score = np.zeros(length, f32)
        for i in range(length):
            for k in range(terms.shape[1]):
                score[i] += terms[image, k, i]
            score[i] /= scale
            score[i] = min(max(score[i], -most), most) if score[i] == score[i] else f32(0)
        for s in special[image]:
            score[s] = np.inf
        rank = np.argsort(score, kind="mergesort")[: remove + targets]
        norm = np.empty(len(rank), f32)
        for k in range(len(rank)):
            at = (image * length + rank[k]) * channels
            norm[k] = max(np.sqrt(dot(memory, at, at, channels)), f32(1e-12))
        into = np.empty(remove, np.int64)
        for k in range(remove):
            similarity, at = f32(-np.inf), (image * length + rank[k]) * channels
            into[k] = rank[remove]
            for j in range(remove, len(rank)):
                near = dot(memory, at, (image * length + rank[j]) * channels, channels) / (norm[k] * norm[j])
                if near > similarity:
                    similarity, into[k] = near, rank[j]
        _write_plan(rank[:remove], into, index[image], size[image], special[image], by_size, dest[image],
                    share[image], keep[image], removed[image], offsets[image], survivors[image], sizes[image],
                    places[image])  # fmt: skip


@jit()
def _least_first(cost, source, into):
    """Sort tokens and their targets by cost, of equal costs the earlier first."""
    sources, targets = source.copy(), into.copy()
    for k in range(len(cost)):
        rank = 0
        for j in range(len(cost)):
            rank += cost[j] < cost[k] or (cost[j] == cost[k] and j < k)
        source[rank], into[rank] = sources[k], targets[k]


@jit()
def _turns(index, special):
    """Of each token of an image: its number among the ordinary tokens, -1 if special, and its place on the grid."""
    turn, place = np.zeros(len(index), np.int64), np.empty(len(index), np.int64)
    for s in special:
        turn[s] = -1
    before = 0
    for i in range(len(index)):
        place[i] = index[i] - before
        if turn[i] < 0:
            before += 1
        else:
            turn[i] = i - before
    return turn, place


@jit()
def _nearest_neighbour(features, row, channels, norm, i, place, token, axes):
    """The most similar target within one row and column of a frame, -1 for none, and its similarity."""
    best, similarity = np.int64(-1), f32(-np.inf)
    for neighbour in range(3 ** min(len(axes), 2)):
        step, rest, stride, to, on_grid = neighbour, place, 1, place, True
        for a in range(len(axes) - 1, max(len(axes) - 3, -1), -1):
            move = step % 3 - 1
            at = rest % axes[a] + move
            on_grid = on_grid and (0 <= at < axes[a] or a == 0)
            to += move * stride
            step, rest, stride = step // 3, rest // axes[a], stride * axes[a]
        if on_grid and 0 <= to < len(token) and token[to] >= 0:
            j = token[to]
            near = dot(features, row + i * channels, row + j * channels, channels) / (norm[i] * norm[j])
            if best < 0 or near > similarity:
                best, similarity = j, near
    return best, similarity


@jit()
def _write_plan(
    source, into, index, size, special, by_size, dest, share, keep, removed, offsets, survivors, sizes, places
):
    """The plan that merges tokens ``source`` into survivors ``into``, and the metadata of the survivors."""
    dest[:] = 0
    for i in source:
        dest[i] = -1
    slot = 0
    for i in range(len(dest)):
        if dest[i] == 0:
            dest[i], keep[slot] = slot, i
            slot += 1
    total, count = np.zeros(slot, f32), np.zeros(slot + 1, np.int64)
    for j in range(slot):
        survivors[j], sizes[j] = index[keep[j]], size[keep[j]]
        total[j] = size[keep[j]] if by_size else f32(1)
    for k in range(len(source)):
        j = dest[into[k]]
        dest[source[k]] = j
        sizes[j] += size[source[k]]
        total[j] += size[source[k]] if by_size else f32(1)
        count[j + 1] += 1
    offsets[0] = 0
    for j in range(slot):
        offsets[j + 1] = offsets[j] + count[j + 1]
    for k in range(len(source)):  # sorted by destination
        j = dest[source[k]]
        removed[offsets[j + 1] - count[j + 1]] = source[k]
        count[j + 1] -= 1
    for i in range(len(dest)):
        share[i] = (size[i] if by_size else f32(1)) / total[dest[i]]
    for s in range(len(special)):
        places[s] = dest[special[s]]
