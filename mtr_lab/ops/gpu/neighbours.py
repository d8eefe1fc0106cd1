"""The decision among neighbours in Triton: a launch each to match the tokens, rank them and write the plan."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.decision_inputs import NeighbourInputs
from mtr_lab.ops.gpu.decision import POSITIONS, merge
from mtr_lab.ops.gpu.occupancy import num_sms, on_its_device

BLOCK, WIDTH, WARPS = 4, 64, 2  # sources of a program, channels at a time, warps
FEW, LOAD = (2, 128, 4), 4  # the same for few images, up to ``LOAD`` programs of ``BLOCK`` for each multiprocessor
NO_COST = tl.constexpr(0x7F800000)  # the bits of infinity


@triton.jit
def _after_special(number, special, SPECIALS: tl.constexpr):
    """The position of the ordinary token of this number, given those of special tokens."""
    position = number
    for _ in tl.static_range(SPECIALS):
        before = number * 0
        for s in tl.static_range(SPECIALS):
            before += (tl.load(special + s) <= position).to(tl.int32)
        position = number + before
    return position


@triton.jit
def _place(position, special, index, SPECIALS: tl.constexpr):
    """The place on the grid of a token of this original position."""
    place = position
    for s in tl.static_range(SPECIALS):
        place -= (tl.load(index + tl.load(special + s)) < position).to(tl.int32)
    return place


@triton.jit
def _find(place, special, index, length, SPECIALS: tl.constexpr, STEPS: tl.constexpr):
    """The position of the token that stood at a place of the grid, and whether it is still in the sequence."""
    original = place
    for _ in tl.static_range(SPECIALS):
        before = place * 0
        for s in tl.static_range(SPECIALS):
            before += (tl.load(index + tl.load(special + s)) <= original).to(tl.int32)
        original = place + before
    position = place * 0
    for step in tl.static_range(STEPS):  # the number of tokens with a smaller index
        half = 1 << (STEPS - 1 - step)
        at = position + half - 1
        position += tl.where(tl.load(index + at, at < length, 0x7FFFFFFF).to(tl.int32) < original, half, 0)
    return position, tl.load(index + position, position < length, -1).to(tl.int32) == original


@triton.jit
def _target(position, is_there, special, SPECIALS: tl.constexpr):
    """Whether the token at this position has an odd turn."""
    turn = position
    for s in tl.static_range(SPECIALS):
        at = tl.load(special + s).to(tl.int32)
        turn -= (at < position).to(tl.int32)
        is_there = is_there & (at != position)
    return is_there & (turn % 2 == 1)


@triton.jit
def _rows(hidden, residual, at, mask, HIDDEN: tl.constexpr, RESIDUAL: tl.constexpr):
    x = tl.load((hidden if HIDDEN else residual) + at, mask, 0).to(tl.float32)
    if HIDDEN and RESIDUAL:
        x += tl.load(residual + at, mask, 0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["length", "sources", "columns", "rows", "step_index", "step_weight"])
def _cost_block(hidden, residual, weight, index, special, keys, into, length, sources, columns, rows, step_index,
                step_weight, channels, HIDDEN: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHTED: tl.constexpr,
                SPECIALS: tl.constexpr, AXES: tl.constexpr, STEPS: tl.constexpr, NEAR: tl.constexpr,
                BLOCK: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """The nearest neighbour of BLOCK sources, and keys that sort them by their weighted distance from it."""
    image, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index, special, first = index + image * step_index, special + image * SPECIALS, image * length
    is_source = k < sources
    source = _after_special(2 * k, special, SPECIALS).to(tl.int32)
    place = _place(tl.load(index + source, is_source, 0).to(tl.int32), special, index, SPECIALS).to(tl.int32)

    n = tl.arange(0, NEAR)
    n += (n >= NEAR // 2).to(tl.int32)  # leaves out the place itself
    right, down = n % 3 - 1, n // 3 - 1
    on_grid = (n <= NEAR)[None, :] & is_source[:, None]
    to = place[:, None] + right[None, :]
    if AXES > 1:
        column = (place % columns)[:, None] + right[None, :]
        on_grid = on_grid & (column >= 0) & (column < columns)
        to += (columns * down)[None, :]
    if AXES > 2:
        row = (place // columns % rows)[:, None] + down[None, :]
        on_grid = on_grid & (row >= 0) & (row < rows)  # stays in the frame
    near, is_there = _find(to, special, index, length, SPECIALS, STEPS)
    is_there = _target(near, is_there & on_grid & (to >= 0), special, SPECIALS)

    product = tl.zeros((BLOCK, NEAR), tl.float32)
    square, near_square = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK, NEAR), tl.float32)
    for c0 in range(0, channels, WIDTH):
        c = c0 + tl.arange(0, WIDTH)
        a_at = (first + source)[:, None] * channels + c[None, :]
        a = _rows(hidden, residual, a_at, is_source[:, None] & (c < channels)[None, :], HIDDEN, RESIDUAL)
        b_at = (first + near)[:, :, None] * channels + c[None, None, :]
        b = _rows(hidden, residual, b_at, is_there[:, :, None] & (c < channels)[None, None, :], HIDDEN, RESIDUAL)
        square += tl.sum(a * a, 1)
        near_square += tl.sum(b * b, 2)
        product += tl.sum(a[:, None, :] * b, 2)
    lengths = tl.maximum(tl.sqrt(square), 1e-12)[:, None] * tl.maximum(tl.sqrt(near_square), 1e-12)
    similarity = tl.div_rn(product, lengths) + 0.0  # -0 becomes +0
    bits = similarity.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32 | (0x7FFFFFFF - near)  # of equals the first
    candidates = tl.where(is_there, key, -(2**63))
    key = tl.max(candidates, 1)
    has_neighbour = key != -(2**63)
    target = tl.min(tl.where(candidates == key[:, None], near, 0x7FFFFFFF), 1).to(tl.int32)
    bits = (key >> 32).to(tl.int32)
    similarity = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)

    # Without a neighbour: the nearest target in the unreduced sequence, the one before or the one behind.
    ordinary = length - SPECIALS
    has_before, has_behind = is_source & (k > 0), is_source & (2 * k + 1 < ordinary)
    before = _after_special(tl.maximum(2 * k - 1, 0), special, SPECIALS).to(tl.int32)
    behind = _after_special(2 * k + 1, special, SPECIALS).to(tl.int32)
    place_before = _place(tl.load(index + before, has_before, 0).to(tl.int32), special, index, SPECIALS)
    place_behind = _place(tl.load(index + behind, has_behind, 0).to(tl.int32), special, index, SPECIALS)
    takes_before = has_before & (~has_behind | (place - place_before <= place_behind - place))
    target = tl.where(has_neighbour, target, tl.where(takes_before, before, behind))

    cost = -similarity
    if WEIGHTED:
        cost = tl.load(weight + image * step_weight + source, is_source, 0) * (1 - similarity)
    bits = (cost + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(has_neighbour & (cost == cost), bits ^ ((bits >> 31) & 0x7FFFFFFF), NO_COST)
    tl.store(keys + image * sources + k, bits.to(tl.int64) << 32 | k, is_source)
    tl.store(into + image * sources + k, target, is_source)


@triton.jit(do_not_specialize=["length", "sources", "num_removed"])
def _least_block(keys, into, special, order, best, length, sources, num_removed, SPECIALS: tl.constexpr,
                 LP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """List the sources of the smallest keys and their targets: a rank is the number of smaller keys."""
    image, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * LP + tl.arange(0, LP)
    keys, mask = keys + image * sources, k < sources
    own = tl.load(keys + k, mask, 2**63 - 1)
    rank = k * 0
    for j0 in range(0, sources, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        other = tl.load(keys + j, j < sources, 2**63 - 1)
        rank += tl.sum((other[:, None] < own[None, :]).to(tl.int32), 0)
    goes = mask & (rank < num_removed)
    source = _after_special(2 * k, special + image * SPECIALS, SPECIALS)
    tl.store(order + image * length + rank, source.to(tl.int32), goes)
    tl.store(best + image * num_removed + rank, tl.load(into + image * sources + k, goes, 0).to(tl.int64), goes)


@on_its_device
def neighbour_plan(inputs: NeighbourInputs) -> tuple[Tensor, ...]:
    """The contract of ``mtr_lab.ops.neighbours.neighbour_plan_reference``."""
    index, size, special, weight, hidden, residual, num_removed, by_size, axes = inputs
    images, length = index.shape
    special = special.contiguous()
    index = index if index.stride(1) == 1 else index.contiguous()
    weight = weight if weight is None or weight.stride(1) == 1 else weight.contiguous()
    sources = (length - special.shape[1] + 1) // 2
    keys, into = special.new_empty(images, sources), special.new_empty(images, sources, dtype=torch.int32)
    order, best = special.new_empty(images, length, dtype=torch.int32), special.new_empty(images, num_removed)

    features = residual if hidden is None else hidden
    assert features is not None
    streams = [size if t is None else t.contiguous() for t in (hidden, residual)]
    columns, rows = axes[-1], axes[-2] if len(axes) > 1 else 1
    few = images * triton.cdiv(sources, BLOCK) <= LOAD * num_sms(index.device)
    block, width, warps = FEW if few else (BLOCK, WIDTH, WARPS)
    _cost_block[images, triton.cdiv(sources, block)](
        *streams, size if weight is None else weight, index, special, keys, into, length, sources, columns, rows,
        index.stride(0), 0 if weight is None else weight.stride(0), features.shape[2], HIDDEN=hidden is not None,
        RESIDUAL=residual is not None, WEIGHTED=weight is not None, SPECIALS=special.shape[1], AXES=len(axes),
        STEPS=length.bit_length(), NEAR=8 if len(axes) > 1 else 2, BLOCK=block,
        WIDTH=width, num_warps=warps,
    )  # fmt: skip
    block = 32
    _least_block[images, triton.cdiv(sources, block)](
        keys, into, special, order, best, length, sources, num_removed, SPECIALS=special.shape[1], LP=block, BLOCK=64,
        num_warps=2,
    )  # fmt: skip
    return merge(order, best, index, size, special, num_removed, match=POSITIONS, by_size=by_size)
