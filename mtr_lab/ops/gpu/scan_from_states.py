"""The gradients of the scan for training, from the states that the forward pass has saved.

A thread owns one channel of one direction of one image, and visits groups of ``SAVE_EVERY`` positions from the last to
the first. For each of the N states in turn, it scans the group from the saved state, then walks backwards through it,
with all positions of the group in registers. It computes one exponential for each position, channel and state. The one
state-sized value it writes is the gradient of the state, which passes from group to group.

The sums over channels, for B and C, run on tensor cores, as a product with a matrix of ones. The summands are rounded
to bfloat16 first if the data is bfloat16; for other data they are added in float32.

Deterministic: each program writes its part of the sums over channels and images; the parts are added afterwards.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.formulas import LOG2E
from mtr_lab.ops.gpu.occupancy import INTERPRETED, on_its_device, registers, reverse_mask
from mtr_lab.ops.gpu.scan_walk import SAVE_EVERY

LN2 = tl.constexpr(0.6931471805599453)
CHANNELS = 64  # of a program, one a thread
REGISTERS = registers(168)  # 128, for 16 warps at once, and two channels a thread are slower


@triton.jit
def _side_by_side(xs):
    """A power of two of (K,) -> (K, their number): no data moves, a thread's values are adjacent."""
    if len(xs) == 1:
        return tl.reshape(xs[0], (xs[0].shape[0], 1))
    else:
        even, odd = _side_by_side(xs[::2]), _side_by_side(xs[1::2])
        return tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def _apart(x):
    """(K, a power of two) -> as many (K,), which no data moves for either."""
    if x.shape[1] == 1:
        return (tl.reshape(x, (x.shape[0],)),)
    else:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        return _in_turn(_apart(even), _apart(odd))


@triton.jit
def _in_turn(even, odd):
    mixed = ()
    for i in tl.static_range(len(even)):
        mixed = mixed + (even[i], odd[i])
    return mixed


@triton.jit
def _slope(dt, EXACT: tl.constexpr):
    """Of softplus, where its value is dt: 1 - exp(-dt)."""
    slope = 1 - tl.exp2(-dt * LOG2E)
    if EXACT:
        series = dt * (1 - dt * 0.5 * (1 - dt * 0.3333333333333333 * (1 - dt * 0.25 * (1 - dt * 0.2))))
        slope = tl.where(dt < 0.125, series, slope)
    return slope


@triton.jit
def _load(x, mask):
    """As float32."""
    return tl.load(x, mask, 0).to(tl.float32)


@triton.jit
def _store(x, value, mask):
    tl.store(x, value.to(x.dtype.element_ty), mask)


@triton.jit
def _touch(x, valid, mask, step: tl.constexpr, ROWS: tl.constexpr):
    """Read one number of every few of rows that are ``step`` apart, x pointing to the channels of the first."""
    row = tl.arange(0, mask.shape[0]) % ROWS
    return _load(x + row * (step - 1), mask & valid)


@triton.jit
def _group(k, dd_e, dbias_e, u, delta, a, bc, z, y, dy, states, du, ddelta, dz, dbc, carried, da, d_e, mask, left,
           channels: tl.constexpr, step_z: tl.constexpr, step_dz: tl.constexpr, scale, more,
           BACK: tl.constexpr, GATE: tl.constexpr, EXACT: tl.constexpr, NP: tl.constexpr,
           ROWS: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """The gradients of group k. All pointers are to its first token in the reading order, of which ``left`` follow.

    ``more``: whether later groups have left something behind. ``GATE``: write the gate's gradient.
    """
    SIGN: tl.constexpr = -1 if BACK else 1
    raw_u, raw_dt, raw_z, raw_y, raw_dy = (), (), (), (), ()
    for j in tl.static_range(U):
        valid = mask & (j < left)
        raw_dt = raw_dt + (tl.load(delta + SIGN * j * channels, valid, 0),)
        raw_u = raw_u + (tl.load(u + SIGN * j * channels, valid, 0),)
        raw_z = raw_z + (tl.load(z + SIGN * j * step_z, valid, 0),)
        raw_dy = raw_dy + (tl.load(dy + SIGN * j * channels, valid, 0),)
        if GATE:
            raw_y = raw_y + (tl.load(y + SIGN * j * channels, valid, 0),)
    tl.debug_barrier()  # all loads are under way before the first is waited for
    # What the group that comes next reads, to have it in the cache then. It is used, times 0, or would be left out.
    touched = _touch(delta - SIGN * U * channels, k > 0, mask, SIGN * channels, U)
    touched += _touch(u - SIGN * U * channels, k > 0, mask, SIGN * channels, U)
    touched += _touch(z - SIGN * U * step_z, k > 0, mask, SIGN * step_z, U)
    touched += _touch(dy - SIGN * U * channels, k > 0, mask, SIGN * channels, U)
    if GATE:
        touched += _touch(y - SIGN * U * channels, k > 0, mask, SIGN * channels, U)
    touched += _touch(states - NP * channels, k > 1, mask, channels, NP)
    channel = tl.arange(0, mask.shape[0])
    touched += tl.load(bc - 2 * NP * U + channel * (2 * NP * U // mask.shape[0]), (channel >= 0) & (k > 0), 0)
    dts, writes, dys, dwrites, dspans = (), (), (), (), ()
    for j in tl.static_range(U):
        valid = mask & (j < left)
        dt, z_t, grad = raw_dt[j].to(tl.float32), raw_z[j].to(tl.float32), raw_dy[j].to(tl.float32) * scale
        gate = 1 / (1 + tl.exp2(-z_t * LOG2E))
        dts = dts + (dt,)
        writes = writes + (dt * raw_u[j].to(tl.float32),)
        dys = dys + (grad * z_t * gate,)
        dwrites, dspans = dwrites + (tl.zeros_like(dt),), dspans + (tl.zeros_like(dt),)
        if GATE:
            dz_t = grad * raw_y[j].to(tl.float32) * gate * (1 + z_t * (1 - gate))
            _store(dz + SIGN * j * step_dz, dz_t, valid)
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, 2 * U), tl.float32)
    h_first = _load(states, mask & (k > 0))
    dh_first = _load(carried, mask & more)
    da_first = _load(da, mask & more)
    a_first = _load(a, mask)
    sums = total
    for n in tl.range(0, NP, num_stages=1):
        # Every thread reads all of B and C, a few numbers at once.
        both = ()
        for part in tl.static_range(2 * U // 4):
            four = n * (2 * U) + 4 * part + tl.arange(0, 4)
            both = both + _apart(tl.load(bc + four[None, :] + 0 * channel[:, None]))
        h, dh, da_n, a_n = h_first, dh_first, da_first, a_first
        hs, fades = (h,), ()
        for j in tl.static_range(U):
            fade = tl.exp2(dts[j] * (a_n * LOG2E))
            h = tl.fma(fade, h, writes[j] * both[j])
            hs, fades = hs + (h,), fades + (fade,)
        following = tl.minimum(n + 1, NP - 1) * channels
        a_first = _load(a + following, mask)
        h_first = _load(states + following, mask & (k > 0))
        dh_first = _load(carried + following, mask & more)
        da_first = _load(da + following, mask & more)
        more_writes, more_spans, for_b, for_c = (), (), (), ()
        for j in tl.static_range(U - 1, -1, -1):
            dh = tl.fma(dys[j], both[U + j], dh)
            for_b, for_c = (dh * writes[j],) + for_b, (dys[j] * hs[j + 1],) + for_c
            more_writes = (dwrites[j] + dh * both[j],) + more_writes
            dh *= fades[j]
            q = dh * hs[j]  # the gradient of the exponent Δ · A
            da_n += q * dts[j]
            more_spans = (dspans[j] + q * a_n,) + more_spans
        dwrites, dspans = more_writes, more_spans
        _store(carried + n * channels, dh, mask)
        _store(da + n * channels, da_n, mask)
        total = tl.where(row[:, None] == n - 1, sums, total)  # of the state before: nothing waits for the product
        products = _side_by_side(for_b + for_c)
        if EXACT:
            sums = tl.sum(products, 0)[None, :] + tl.zeros((ROWS, 2 * U), tl.float32)
        else:  # the same in every row; pairs of channels, so that a thread's values stay adjacent
            pairs = tl.reshape(products.to(tl.bfloat16), (products.shape[0] // 2, 4 * U))
            doubled = tl.dot(tl.full((ROWS, products.shape[0] // 2), 1, tl.bfloat16), pairs)
            sums = tl.sum(tl.reshape(doubled, (ROWS, 2, 2 * U)), 1)
    total = tl.where(row[:, None] == NP - 1, sums, total)
    dd_e += touched * 0
    column = tl.arange(0, 2 * U)
    at = dbc + (SIGN * (column % U) * (2 * NP) + column // U * NP)[None, :] + row[:, None]
    tl.store(at, total, (row < NP)[:, None] & (column % U < left)[None, :])
    for j in tl.static_range(U):
        valid = mask & (j < left)
        u_t = _load(u + SIGN * j * channels, valid)
        raw = (dspans[j] + u_t * dwrites[j]) * _slope(dts[j], EXACT)
        dd_e += dys[j] * u_t
        dbias_e += raw
        _store(du + SIGN * j * channels, dts[j] * dwrites[j] + d_e * dys[j], valid)
        _store(ddelta + SIGN * j * channels, raw, valid)
    return dd_e, dbias_e


@triton.jit
def _direction(g: tl.constexpr, u, delta, a, bc, d, z, y, dy, states, du, ddelta, dz, dbc, carried, da, dd, dbias,
               images, length, channels: tl.constexpr, step_z: tl.constexpr, step_dz: tl.constexpr, scale,
               BACK: tl.constexpr, EXACT: tl.constexpr, NP: tl.constexpr, ROWS: tl.constexpr, CH: tl.constexpr,
               U: tl.constexpr):  # fmt: skip
    e = tl.program_id(0) * CH + tl.arange(0, CH)
    mask = e < channels
    row = tl.program_id(1).to(tl.int64)
    groups = tl.cdiv(length, U)
    k = groups - 1
    first = length - 1 - k * U if BACK else k * U
    rows, image_rows = row * length + first, (row - g * images) * length + first
    u += rows * channels + e
    delta += rows * channels + e
    du += rows * channels + e
    ddelta += rows * channels + e
    dbc += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) * length + rows) * (2 * NP)
    z += image_rows * step_z + e
    dz += image_rows * step_dz + e
    y += image_rows * channels + e
    dy += image_rows * channels + e
    bc += (row * groups + k) * (2 * NP * U)
    states += (row * k + k - 1) * NP * channels + e
    carried += row * NP * channels + e
    da += row * NP * channels + e
    a += g * NP * channels + e
    d_e = tl.load(d + g * channels + e, mask, 0)
    zero = tl.zeros((CH,), tl.float32)
    dd_e, dbias_e = zero, zero
    for i in range(groups):
        token = ((k - i).to(tl.int64) - k) * (-U if BACK else U)
        dd_e, dbias_e = _group(k - i, dd_e, dbias_e, u + token * channels, delta + token * channels, a,
                               bc - i * (2 * NP * U), z + token * step_z, y + token * channels, dy + token * channels,
                               states - i * (NP * channels), du + token * channels, ddelta + token * channels,
                               dz + token * step_dz, dbc + token * (2 * NP), carried, da, d_e, mask,
                               length - (k - i) * U, channels, step_z, step_dz, scale, i > 0, BACK, g == 0, EXACT, NP,
                               ROWS, U)  # fmt: skip
    tl.store(dd + row * channels + e, dd_e, mask)
    tl.store(dbias + row * channels + e, dbias_e, mask)


@triton.jit(do_not_specialize=["length", "images"])
def _scan_from_states(u, delta, a, bc, d, z, y, dy, states, du, ddelta, dz, dbc, carried, da, dd, dbias,
                      images, length, channels: tl.constexpr, step_z: tl.constexpr, step_dz: tl.constexpr, scale,
                      REVERSE: tl.constexpr, G: tl.constexpr, EXACT: tl.constexpr, NP: tl.constexpr,
                      ROWS: tl.constexpr, CH: tl.constexpr, U: tl.constexpr):  # fmt: skip
    for g in tl.static_range(G):
        if tl.program_id(1) // images == g:
            _direction(g, u, delta, a, bc, d, z, y, dy, states, du, ddelta, dz, dbc, carried, da, dd, dbias, images,
                       length, channels, step_z, step_dz, scale, (REVERSE >> g) & 1, EXACT, NP, ROWS, CH,
                       U)  # fmt: skip


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
    """The gradients of ``mtr_lab.ops.gpu.scan.scan`` without order, gaps and delta_scale.

    Args:
        u, delta: (G, B, L, E), contiguous, Δ after its softplus.
        a, d: (G, N, E) and (G, E) float32.
        bc: B and C in groups of tokens, (G, B, groups, N, 2, SAVE_EVERY) float32, in the reading order.
        z, dz: (B, L, E), rows evenly spaced; the gradient of the gate is written to ``dz``.
        y: the sum of the directions before the gate, (B, L, E); the gradient ``grad`` of the output likewise.
        states: (G, B, groups - 1, N, E), as ``scan`` keeps them.

    Returns:
        The gradients of u and of Δ before bias and softplus, (G, B, L, E); in float32 in parts: of B and C side by
        side, (parts, G, B, L, 2N), of a (G, B, N, E), of d and of Δ's bias (G, B, E).
    """
    directions, images, length, channels = u.shape
    padded = a.shape[1]
    blocks = triton.cdiv(channels, CHANNELS)
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dbc = u.new_empty(blocks, directions, images, length, 2 * padded, dtype=torch.float32)
    carried, da = (u.new_empty(directions, images, padded, channels, dtype=torch.float32) for _ in range(2))
    dd, dbias = (u.new_empty(directions, images, channels, dtype=torch.float32) for _ in range(2))
    _scan_from_states[blocks, directions * images](
        u, delta, a, bc, d, z, y, grad.contiguous(), states, du, ddelta, dz, dbc, carried, da, dd, dbias, images,
        length, channels, z.stride(1), dz.stride(1), scale, REVERSE=reverse_mask(reverse), G=directions,
        EXACT=u.dtype != torch.bfloat16 or INTERPRETED, NP=padded, ROWS=max(padded, 16), CH=CHANNELS, U=SAVE_EVERY,
        num_warps=CHANNELS // 32, **REGISTERS,
    )  # fmt: skip
    return du, ddelta, dbc, da, dd, dbias
