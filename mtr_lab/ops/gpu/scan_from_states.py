"""The gradients of the scan for training, from the states that the forward pass has saved.

A thread owns two channels of one direction of one image, and visits groups of ``SAVE_EVERY`` positions from the last to
the first. For each of the N states in turn, it scans the group from the saved state, then walks backwards through it,
with all positions of the group in registers. It computes one exponential for each position, channel and state. The
state-sized values it writes are the gradients of the state and of A, which pass from group to group.

The last group ends at the last position, and so may overlap the group before it: there, Δ and the gradient of the
output count as 0, which changes nothing.

The sums over channels, for B and C, run on tensor cores if the data is bfloat16, and round the summands to bfloat16:
in registers on NVIDIA's (``lane_sums``), as a product with a matrix of ones on others. For other data the summands are
added in float32.

Deterministic: each program writes its part of the sums over channels and images; the parts are added afterwards.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.formulas import LOG2E
from mtr_lab.ops.gpu.lane_sums import (
    add_pair_products,
    add_quads,
    bfloat16_pair,
    pair_products,
    quad_sums,
    selection,
)
from mtr_lab.ops.gpu.occupancy import INTERPRETED, on_its_device, registers, reverse_mask, rows, unstack
from mtr_lab.ops.gpu.scan_walk import SAVE_EVERY

CHANNELS = 2  # of a thread; one, with 168 registers, is up to 3 % slower
REGISTERS = registers(255)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _columns(xs):
    """n vectors (K,) -> (K, n), n a power of two. No data moves: a thread keeps the values of its rows."""
    if len(xs) == 1:
        return tl.reshape(xs[0], (xs[0].shape[0], 1))
    else:
        even, odd = _columns(xs[::2]), _columns(xs[1::2])
        return tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def _vectors(x):
    """(K, n) -> n vectors (K,), the inverse of ``_columns``."""
    if x.shape[1] == 1:
        return (tl.reshape(x, (x.shape[0],)),)
    else:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        return _interleaved(_vectors(even), _vectors(odd))


@triton.jit
def _interleaved(even, odd):
    """The entries of two tuples of equal length, by turns."""
    mixed = ()
    for i in tl.static_range(len(even)):
        mixed = mixed + (even[i], odd[i])
    return mixed


@triton.jit
def _stack(xs):
    """n vectors (K,) -> (n, K), the inverse of ``unstack``."""
    if len(xs) == 1:
        return tl.reshape(xs[0], (1, xs[0].shape[0]))
    else:
        first, second = _stack(xs[: len(xs) // 2]), _stack(xs[len(xs) // 2 :])
        return tl.reshape(tl.permute(tl.join(first, second), (2, 0, 1)), (len(xs), xs[0].shape[0]))


@triton.jit
def _by_channel(x, U: tl.constexpr):
    """(U, CH) -> U vectors (threads,) of the first channel of each thread, then those of the second."""
    vectors = unstack(x, U)
    first, second = (), ()
    for j in tl.static_range(U):
        one, other = tl.split(tl.reshape(vectors[j], (x.shape[1] // 2, 2)))
        first, second = first + (one,), second + (other,)
    return first + second


@triton.jit
def _side_by_side(xs, U: tl.constexpr):
    """The inverse of ``_by_channel``."""
    vectors = ()
    for j in tl.static_range(U):
        vectors = vectors + (tl.reshape(tl.join(xs[j], xs[U + j]), (2 * xs[j].shape[0],)),)
    return _stack(vectors)


@triton.jit
def _slope(dt, EXACT: tl.constexpr):
    """The derivative of softplus where its value is dt: 1 - exp(-dt). ``EXACT``: without cancellation for small dt."""
    slope = 1 - tl.exp2(-dt * LOG2E)
    if EXACT:
        series = dt * (1 - dt * 0.5 * (1 - dt * 0.3333333333333333 * (1 - dt * 0.25 * (1 - dt * 0.2))))
        slope = tl.where(dt < 0.125, series, slope)
    return slope


@triton.jit
def _reciprocal(x, SUMS: tl.constexpr):
    """1 / x; in one instruction on NVIDIA's GPUs, correct but for the last bit."""
    if SUMS == "lanes":
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1 / x


@triton.jit
def _store(x, value, mask):
    """Store the value in the dtype of x."""
    tl.store(x, value.to(x.dtype.element_ty), mask)


@triton.jit
def _load(x, mask, WHOLE: tl.constexpr):
    """The values, 0 where masked; ``WHOLE``: nothing is masked."""
    return tl.load(x) if WHOLE else tl.load(x, mask, 0)


@triton.jit
def _tokens(x, token, stride: tl.constexpr, e, SIGN: tl.constexpr, C: tl.constexpr, U: tl.constexpr):
    """Pointers to U tokens in reading order, (U, CH). The hint of alignment gives every thread its own channels."""
    at = x + token * stride + e[None, :] + (SIGN * stride * tl.arange(0, U))[:, None]
    BYTES: tl.constexpr = C * x.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(at, (BYTES, BYTES))


@triton.jit
def _touch(x, token, stride: tl.constexpr, lane, valid, SIGN: tl.constexpr, C: tl.constexpr, U: tl.constexpr):
    """Bring U tokens to the cache, by one load of each thread."""
    at = lane % U * (SIGN * stride) + lane // U * (C * U)
    return tl.load(x + token * stride + at, valid, 0).to(tl.float32)


@triton.jit
def _four(x, i, channels: tl.constexpr, lane, C: tl.constexpr):
    """Pointers to states 4 i to 4 i + 3 of a thread's channels, (threads, 4 C), in a tensor (N / 4, E, 4)."""
    return x + i * (4 * channels) + 4 * C * lane[:, None] + tl.arange(0, 4 * C)[None, :]


@triton.jit
def _load_four(x, i, has_later, lane, stride, C: tl.constexpr):
    """States 4 i to 4 i + 3 of each channel of a thread in turn, from a tensor (N / 4, stride)."""
    numbers = ()
    for c in tl.static_range(C):
        at = x + i * stride + (c * lane.shape[0] + lane[:, None]) * 4 + tl.arange(0, 4)[None, :]
        numbers = numbers + _vectors(tl.load(at, (lane[:, None] >= 0) & has_later, 0))
    return numbers


@triton.jit
def _store_four(x, i, numbers, lane, stride, C: tl.constexpr):
    """The inverse of ``_load_four``, for numbers state by state."""
    for c in tl.static_range(C):
        at = x + i * stride + (c * lane.shape[0] + lane[:, None]) * 4 + tl.arange(0, 4)[None, :]
        tl.store(at, _columns(numbers[c::C]))


@triton.jit
def _for_all(x, lane, COUNT: tl.constexpr):
    """``COUNT`` numbers that every thread loads, four at a time."""
    numbers = ()
    for i in tl.static_range(0, COUNT, 4):
        numbers = numbers + _vectors(tl.load(x + i + tl.arange(0, 4)[None, :] + 0 * lane[:, None]))
    return numbers


@triton.jit
def _state(h, dh, da_n, a_n, both, dts, writes, dys, dwrites, dspans):
    """One state: scan the group from state h, then walk back through it from the gradient dh of its last state.

    Args:
        a_n: A / ln 2.
        both: B of the tokens, then C.
        dwrites, dspans: for each token, the gradient of Δ u; the gradient of Δ through the exponential, over ln 2.

    Returns:
        dh, da_n, dwrites and dspans plus the state's part; the gradients of the states after the tokens; these states.
    """
    hs, fades = (h,), ()
    for j in tl.static_range(len(dts)):
        fade = tl.exp2(dts[j] * a_n)
        h = tl.fma(fade, h, writes[j] * both[j])
        hs, fades = hs + (h,), fades + (fade,)
    new_dwrites, new_dspans, dhs = (), (), ()
    for j in tl.static_range(len(dts) - 1, -1, -1):
        dh = tl.fma(dys[j], both[len(dts) + j], dh)
        dhs = (dh,) + dhs
        new_dwrites = (tl.fma(dh, both[j], dwrites[j]),) + new_dwrites
        dh *= fades[j]
        q = dh * hs[j]  # the gradient of the exponent Δ · A
        da_n = tl.fma(q, dts[j], da_n)
        new_dspans = (tl.fma(q, a_n, dspans[j]),) + new_dspans
    return dh, da_n, new_dwrites, new_dspans, dhs, hs[1:]


@triton.jit
def _sums(products, ROWS: tl.constexpr, SUMS: tl.constexpr):
    """The sums over threads of (threads, 2 U) products, in ``ROWS`` equal rows."""
    if SUMS == "exact":
        return tl.sum(products, 0)[None, :] + tl.zeros((ROWS, products.shape[1]), tl.float32)
    else:  # two threads a row of ``pairs``: a thread then stores pairs of bfloat16
        pairs = tl.reshape(products.to(tl.bfloat16), (products.shape[0] // 2, 2 * products.shape[1]))
        doubled = tl.dot(tl.full((ROWS, products.shape[0] // 2), 1, tl.bfloat16), pairs)
        return tl.sum(tl.reshape(doubled, (ROWS, 2, products.shape[1])), 1)


@triton.jit
def _group(k, dd_e, dbias_e, u, delta, a, bc, z, y, dy, states, du, ddelta, dz, dbc, dstates, da, d_e, e, mask, lane,
           exist, length, channels: tl.constexpr, stride_z: tl.constexpr, stride_dz: tl.constexpr, scale, has_later,
           BACKWARD: tl.constexpr, GATE: tl.constexpr, SUMS: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
           NP: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """Write the gradients of group k; returns ``dd_e`` and ``dbias_e`` plus the sums over its tokens.

    Pointers are to the first token of the image and the first channel of the program.

    Args:
        e, mask: numbers the channels of the program; whether they exist.
        lane, exist: numbers the threads; whether the channels of ``_four`` exist.
        has_later: whether ``dstates`` and ``da`` hold the gradients from later groups; else they count as 0.
        GATE: whether this direction writes the gradient of the gate.
        SUMS: how to add over channels: "exact" in float32, "lanes" by ``lane_sums``, "dot" by a product with ones.
        WHOLE: every token of a group and every channel of the program exists.
        EVEN: every channel of the program exists.
    """
    SIGN: tl.constexpr = -1 if BACKWARD else 1
    start = tl.maximum(tl.minimum(k * U, length - U), 0)
    first = length - 1 - start if BACKWARD else start
    position = start + tl.arange(0, U)
    counts = (position >= k * U) & (position < length)
    valid = counts[:, None] & mask[None, :]
    dt = _load(_tokens(delta, first, channels, e, SIGN, C, U), valid, WHOLE)
    u_t = _load(_tokens(u, first, channels, e, SIGN, C, U), valid, WHOLE)
    z_t = _load(_tokens(z, first, stride_z, e, SIGN, C, U), valid, WHOLE)
    grad = _load(_tokens(dy, first, channels, e, SIGN, C, U), valid, WHOLE)
    y_t = grad
    if GATE:
        y_t = _load(_tokens(y, first, channels, e, SIGN, C, U), valid, WHOLE)
    tl.debug_barrier()  # all loads are issued before the first is waited for
    # Bring the inputs of the next group, k - 1, to the cache. The sum is used, times 0: else the compiler drops it.
    touched = tl.zeros(lane.shape, tl.float32)
    if EVEN:
        more = (lane >= 0) & (k > 0)
        following = length - 1 - (k - 1) * U if BACKWARD else (k - 1) * U
        touched += _touch(delta, following, channels, lane, more, SIGN, C, U)
        touched += _touch(u, following, channels, lane, more, SIGN, C, U)
        touched += _touch(z, following, stride_z, lane, more, SIGN, C, U)
        touched += _touch(dy, following, channels, lane, more, SIGN, C, U)
        if GATE:
            touched += _touch(y, following, channels, lane, more, SIGN, C, U)
        SHARE: tl.constexpr = NP * C  # of a thread, of the saved states
        at = lane * SHARE // (4 * e.shape[0]) * (4 * channels) + lane * SHARE % (4 * e.shape[0])
        touched += tl.load(states + (k - 2).to(tl.int64) * (NP * channels) + at, more & (k > 1), 0).to(tl.float32)
        touched += tl.load(bc + (k - 1).to(tl.int64) * (2 * NP * U) + lane * (2 * NP * U // lane.shape[0]), more, 0)

    dt = tl.where(counts[:, None], dt.to(tl.float32), 0)
    z_t = z_t.to(tl.float32)
    gate = _reciprocal(1 + tl.exp2(-z_t * LOG2E), SUMS)
    grad = tl.where(counts[:, None], grad.to(tl.float32) * scale, 0) * gate
    dy_t = grad * z_t
    if GATE:
        _store(_tokens(dz, first, stride_dz, e, SIGN, C, U), y_t.to(tl.float32) * (grad + dy_t * (1 - gate)), valid)
    dts, writes, dys = _by_channel(dt, U), _by_channel(dt * u_t.to(tl.float32), U), _by_channel(dy_t, U)

    zero = tl.zeros(lane.shape, tl.float32)
    dwrites, dspans, low, high, select, write_pairs, dy_pairs = (), (), (), (), (), (), ()
    for _ in tl.static_range(C * U):
        dwrites, dspans = dwrites + (zero,), dspans + (zero,)
    total = tl.zeros((ROWS, 2 * U), tl.float32)
    if SUMS == "lanes":
        select = selection(lane.shape[0])
        low, high = (zero, zero, zero, zero), (zero, zero, zero, zero)
        for j in tl.static_range(0, C * U, 2):
            write_pairs = write_pairs + (bfloat16_pair(writes[j], writes[j + 1]),)
            dy_pairs = dy_pairs + (bfloat16_pair(dys[j], dys[j + 1]),)
    stride = tl.num_programs(0) * (4 * e.shape[0])  # of ``dstates`` and ``da``, from four states to the next
    bc += k.to(tl.int64) * (2 * NP * U)
    states += (k - 1).to(tl.int64) * (NP * channels)
    next_h = _load(_four(states, 0, channels, lane, C), exist & (k > 0), False)
    for i in tl.range(0, NP // 4, num_stages=1):
        h4 = _vectors(next_h.to(tl.float32))
        dh4, da4 = _load_four(dstates, i, has_later, lane, stride, C), _load_four(da, i, has_later, lane, stride, C)
        next_h = _load(_four(states, tl.minimum(i + 1, NP // 4 - 1), channels, lane, C), exist & (k > 0), False)
        new_dh, new_da, earlier = (), (), ()
        for m in tl.static_range(4):
            n = 4 * i + m
            both = _for_all(bc + n * (2 * U), lane, 2 * U)
            a_n = _load(a + n * channels + e, mask, EVEN) * LOG2E
            a_n = _vectors(tl.reshape(a_n, (lane.shape[0], C)))
            new_dwrites, new_dspans, to_b, to_c = (), (), (), ()
            for c in tl.static_range(C):
                dh, da_n, more_dwrites, more_dspans, dhs, hs = _state(
                    h4[4 * c + m], dh4[4 * c + m], da4[4 * c + m], a_n[c], both, dts[c * U : c * U + U],
                    writes[c * U : c * U + U], dys[c * U : c * U + U], dwrites[c * U : c * U + U],
                    dspans[c * U : c * U + U],
                )  # fmt: skip
                new_dh, new_da = new_dh + (dh,), new_da + (da_n,)
                new_dwrites, new_dspans = new_dwrites + more_dwrites, new_dspans + more_dspans
                if SUMS == "lanes":
                    some_writes = write_pairs[c * (U // 2) : (c + 1) * (U // 2)]
                    some_dys = dy_pairs[c * (U // 2) : (c + 1) * (U // 2)]
                    if c == 0:
                        to_b, to_c = pair_products(dhs, some_writes), pair_products(hs, some_dys)
                    else:
                        to_b = add_pair_products(to_b, dhs, some_writes)
                        to_c = add_pair_products(to_c, hs, some_dys)
                else:
                    products = ()
                    for j in tl.static_range(U):
                        products = products + (dhs[j] * writes[c * U + j],)
                    for j in tl.static_range(U):
                        products = products + (hs[j] * dys[c * U + j],)
                    sums = _sums(_columns(products), ROWS, SUMS)
                    total += tl.where(tl.arange(0, ROWS)[:, None] == n, sums, 0)
            dwrites, dspans = new_dwrites, new_dspans
            if SUMS == "lanes":
                quads = quad_sums(to_b, to_c, select)
                if m == 1:
                    low = add_quads(low, earlier, quads, 2 * i)
                if m == 3:
                    high = add_quads(high, earlier, quads, 2 * i)
                earlier = quads
        _store_four(dstates, i, new_dh, lane, stride, C)
        _store_four(da, i, new_da, lane, stride, C)

    if SUMS == "lanes":
        thread, part = tl.arange(0, 32), tl.arange(0, 8)
        at = (SIGN * (thread // 4) * (2 * NP) + thread % 4 * 4)[:, None] + (part // 4 * NP + part % 4)[None, :]
        position = start + thread // 4
        stored = (position >= k * U) & (position < length) & (thread % 4 < NP // 4)
        _store(dbc + first * (2 * NP) + at, _columns(low[:2] + high[:2] + low[2:] + high[2:]), stored[:, None])
    else:
        n, column = tl.arange(0, ROWS), tl.arange(0, 2 * U)
        position = start + column % U
        at = dbc + (first + SIGN * (column % U))[None, :] * (2 * NP) + (column // U * NP)[None, :] + n[:, None]
        tl.store(at, total, (n < NP)[:, None] & ((position >= k * U) & (position < length))[None, :])
    u_t = _load(_tokens(u, first, channels, e, SIGN, C, U), valid, WHOLE).to(tl.float32)
    dwrite = _side_by_side(dwrites, U)
    raw = (_side_by_side(dspans, U) * LN2 + u_t * dwrite) * _slope(dt, SUMS == "exact")
    _store(_tokens(du, first, channels, e, SIGN, C, U), dt * dwrite + d_e[None, :] * dy_t, valid)
    _store(_tokens(ddelta, first, channels, e, SIGN, C, U), raw, valid)
    return dd_e + tl.sum(dy_t * u_t, 0) + tl.sum(touched, 0) * 0, dbias_e + tl.sum(raw, 0)


@triton.jit
def _direction(g: tl.constexpr, u, delta, a, bc, d, z, y, dy, states, du, ddelta, dz, dbc, dstates, da, dd, dbias,
               images, length, channels: tl.constexpr, stride_z: tl.constexpr, stride_dz: tl.constexpr, scale,
               BACKWARD: tl.constexpr, SUMS: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, NP: tl.constexpr,
               ROWS: tl.constexpr, LANES: tl.constexpr, C: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """The gradients of direction g of one image: groups of U positions from the last to the first."""
    CH: tl.constexpr = C * LANES
    lane, e = tl.arange(0, LANES), tl.arange(0, CH)
    first = tl.program_id(0) * CH
    mask, exist = e >= 0, lane[:, None] >= 0
    if not EVEN:
        mask = first + e < channels
        exist = first + C * lane[:, None] + tl.arange(0, 4 * C)[None, :] // 4 < channels
    row = tl.program_id(1).to(tl.int64)
    groups = tl.cdiv(length, U)
    here, image = row * length * channels + first, (row - g * images) * length
    bc += row * groups * (2 * NP * U)
    states += row * (groups - 1) * NP * channels + 4 * first
    dbc += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + row) * length * (2 * NP)
    dstates += (row * (NP // 4) * tl.num_programs(0) + tl.program_id(0)) * (4 * CH)
    da += (row * (NP // 4) * tl.num_programs(0) + tl.program_id(0)) * (4 * CH)
    a += g * NP * channels + first
    d_e = tl.load(d + g * channels + first + e, mask, 0)
    dd_e, dbias_e = tl.zeros((CH,), tl.float32), tl.zeros((CH,), tl.float32)
    for i in range(groups):
        dd_e, dbias_e = _group(groups - 1 - i, dd_e, dbias_e, u + here, delta + here, a, bc,
                               z + image * stride_z + first, y + image * channels + first,
                               dy + image * channels + first, states, du + here, ddelta + here,
                               dz + image * stride_dz + first, dbc, dstates, da, d_e, e, mask, lane, exist, length,
                               channels, stride_z, stride_dz, scale, i > 0, BACKWARD, g == 0, SUMS, WHOLE, EVEN, NP,
                               ROWS, C, U)  # fmt: skip
    tl.store(dd + row * channels + first + e, dd_e, mask)
    tl.store(dbias + row * channels + first + e, dbias_e, mask)


@triton.jit(do_not_specialize=["length", "images"])
def _scan_from_states(u, delta, a, bc, d, z, y, dy, states, du, ddelta, dz, dbc, dstates, da, dd, dbias,
                      images, length, channels: tl.constexpr, stride_z: tl.constexpr, stride_dz: tl.constexpr, scale,
                      REVERSE: tl.constexpr, G: tl.constexpr, SUMS: tl.constexpr, WHOLE: tl.constexpr,
                      EVEN: tl.constexpr, NP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, C: tl.constexpr,
                      U: tl.constexpr):  # fmt: skip
    for g in tl.static_range(G):
        if tl.program_id(1) // images == g:
            _direction(g, u, delta, a, bc, d, z, y, dy, states, du, ddelta, dz, dbc, dstates, da, dd, dbias, images,
                       length, channels, stride_z, stride_dz, scale, (REVERSE >> g) & 1, SUMS, WHOLE, EVEN, NP, ROWS,
                       LANES, C, U)  # fmt: skip


@on_its_device
def scan_from_states(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    bc: Tensor,
    d: Tensor,
    z: Tensor,
    y: Tensor,
    states: Tensor,
    grad: Tensor,
    dz: Tensor,
    reverse: Sequence[int],
    scale: float,
) -> tuple[Tensor, ...]:
    """The gradients of ``mtr_lab.ops.gpu.scan.scan`` without order, gap and delta_scale. Deterministic.

    Args:
        u: (G, B, L, E), contiguous.
        delta: Δ after bias and softplus, (G, B, L, E), contiguous.
        a: (G, N, E) float32.
        bc: B and C in reading order, (G, B, groups, N, 2, SAVE_EVERY) float32: ``grouped`` of ``mixer_training``.
        d: (G, E) float32.
        z: the gate, (B, L, E); copied unless its rows are contiguous and evenly spaced.
        y: the sum over directions before the gate, (B, L, E), contiguous: ``ungated`` of ``scan``.
        states: (G, B, groups - 1, N / 4, E, 4), contiguous: ``saved`` of ``scan``.
        grad: the gradient of the output, (B, L, E).
        dz: the gradient of ``z`` is written here, (B, L, E), rows contiguous and evenly spaced.
        reverse, scale: as for ``scan``.

    Returns:
        du: (G, B, L, E) in the dtype of ``u``.
        ddelta: the gradient of Δ before bias and softplus, (G, B, L, E) in the dtype of ``delta``.
        dbc: for B and C side by side, (parts, G, B, L, 2N) in bfloat16 or float32; the gradient is the sum over parts.
        da: (G, B, N / 4, blocks, CHANNELS, threads, 4) float32; the gradient is the sum over images, as for dd and
            dbias. For the order of channels see ``mixer_weights.Parts``.
        dd: (G, B, E) float32.
        dbias: for the bias of Δ, (G, B, E) float32.
    """
    z = rows(z)
    directions, images, length, channels = u.shape
    padded = a.shape[1]
    sums = "exact"
    if u.dtype == torch.bfloat16 and not INTERPRETED:
        sums = "lanes" if torch.version.hip is None and padded <= 16 else "dot"
    lanes = 64 if sums == "dot" else 32  # threads of a program
    width = lanes * CHANNELS
    blocks = triton.cdiv(channels, width)
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dbc = u.new_empty(blocks, directions, images, length, 2 * padded, dtype=torch.float32 if sums != "lanes" else None)
    shape = directions, images, padded // 4, blocks, CHANNELS, lanes, 4
    dstates, da = (u.new_empty(shape, dtype=torch.float32) for _ in range(2))
    dd, dbias = (u.new_empty(directions, images, channels, dtype=torch.float32) for _ in range(2))
    _scan_from_states[blocks, directions * images](
        u, delta, a, bc, d, z, y, grad.contiguous(), states, du, ddelta, dz, dbc, dstates, da, dd, dbias, images,
        length, channels, z.stride(1), dz.stride(1), scale, REVERSE=reverse_mask(reverse), G=directions, SUMS=sums,
        WHOLE=channels % width == 0 and length >= SAVE_EVERY.value, EVEN=channels % width == 0, NP=padded,
        ROWS=max(padded, 16), LANES=lanes, C=CHANNELS, U=SAVE_EVERY, num_warps=lanes // 32, **REGISTERS,
    )  # fmt: skip
    return du, ddelta, dbc, da, dd, dbias
