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
from mtr_lab.ops.gpu.occupancy import INTERPRETED, on_its_device, registers, reverse_mask, rows
from mtr_lab.ops.gpu.scan_walk import SAVE_EVERY

CHANNELS = 64  # of a program, one for each thread
REGISTERS = registers(168)  # 128, which fit 16 warps, are slower; so are two channels a thread


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
def _slope(dt, EXACT: tl.constexpr):
    """The derivative of softplus where its value is dt: 1 - exp(-dt). ``EXACT``: without cancellation for small dt."""
    slope = 1 - tl.exp2(-dt * LOG2E)
    if EXACT:
        series = dt * (1 - dt * 0.5 * (1 - dt * 0.3333333333333333 * (1 - dt * 0.25 * (1 - dt * 0.2))))
        slope = tl.where(dt < 0.125, series, slope)
    return slope


@triton.jit
def _load(x, mask):
    """The values as float32, 0 where masked."""
    return tl.load(x, mask, 0).to(tl.float32)


@triton.jit
def _store(x, value, mask):
    """Store the value in the dtype of x."""
    tl.store(x, value.to(x.dtype.element_ty), mask)


@triton.jit
def _prefetch(x, valid, mask, stride: tl.constexpr, ROWS: tl.constexpr):
    """Touch the cache lines of ``ROWS`` rows, one number for each thread; x points to the channels of the first row."""
    row = tl.arange(0, mask.shape[0]) % ROWS
    return _load(x + row * (stride - 1), mask & valid)


@triton.jit
def _group(k, dd_e, dbias_e, u, delta, a, bc, z, y, dy, states, du, ddelta, dz, dbc, dstates, da, d_e, mask,
           remaining, channels: tl.constexpr, stride_z: tl.constexpr, stride_dz: tl.constexpr, scale, has_later,
           BACKWARD: tl.constexpr, GATE: tl.constexpr, EXACT: tl.constexpr, NP: tl.constexpr,
           ROWS: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """Write the gradients of group k; returns ``dd_e`` and ``dbias_e`` plus the sums over its tokens.

    Pointers are to the first token of the group in reading order, from which ``remaining`` tokens are left to the end.

    Args:
        has_later: whether ``dstates`` and ``da`` hold the gradients from later groups; else they count as 0.
        GATE: whether this direction writes the gradient of the gate.
    """
    SIGN: tl.constexpr = -1 if BACKWARD else 1
    loaded_u, loaded_dt, loaded_z, loaded_y, loaded_dy = (), (), (), (), ()
    for j in tl.static_range(U):
        valid = mask & (j < remaining)
        loaded_dt = loaded_dt + (tl.load(delta + SIGN * j * channels, valid, 0),)
        loaded_u = loaded_u + (tl.load(u + SIGN * j * channels, valid, 0),)
        loaded_z = loaded_z + (tl.load(z + SIGN * j * stride_z, valid, 0),)
        loaded_dy = loaded_dy + (tl.load(dy + SIGN * j * channels, valid, 0),)
        if GATE:
            loaded_y = loaded_y + (tl.load(y + SIGN * j * channels, valid, 0),)
    tl.debug_barrier()  # all loads are issued before the first is waited for
    # Bring the inputs of the next group, k - 1, to the cache. The sum is used, times 0: else the compiler drops it.
    prefetched = _prefetch(delta - SIGN * U * channels, k > 0, mask, SIGN * channels, U)
    prefetched += _prefetch(u - SIGN * U * channels, k > 0, mask, SIGN * channels, U)
    prefetched += _prefetch(z - SIGN * U * stride_z, k > 0, mask, SIGN * stride_z, U)
    prefetched += _prefetch(dy - SIGN * U * channels, k > 0, mask, SIGN * channels, U)
    if GATE:
        prefetched += _prefetch(y - SIGN * U * channels, k > 0, mask, SIGN * channels, U)
    prefetched += _prefetch(states - NP * channels, k > 1, mask, channels, NP)
    channel = tl.arange(0, mask.shape[0])
    prefetched += tl.load(bc - 2 * NP * U + channel * (2 * NP * U // mask.shape[0]), (channel >= 0) & (k > 0), 0)
    dts, writes, dys, dwrites, dspans = (), (), (), (), ()
    for j in tl.static_range(U):
        valid = mask & (j < remaining)
        dt, z_t, grad = loaded_dt[j].to(tl.float32), loaded_z[j].to(tl.float32), loaded_dy[j].to(tl.float32) * scale
        gate = 1 / (1 + tl.exp2(-z_t * LOG2E))
        dts = dts + (dt,)
        writes = writes + (dt * loaded_u[j].to(tl.float32),)
        dys = dys + (grad * z_t * gate,)
        dwrites, dspans = dwrites + (tl.zeros_like(dt),), dspans + (tl.zeros_like(dt),)
        if GATE:
            dz_t = grad * loaded_y[j].to(tl.float32) * gate * (1 + z_t * (1 - gate))
            _store(dz + SIGN * j * stride_dz, dz_t, valid)
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, 2 * U), tl.float32)
    next_h = _load(states, mask & (k > 0))
    next_dh = _load(dstates, mask & has_later)
    next_da = _load(da, mask & has_later)
    next_a = _load(a, mask)
    sums = total
    for n in tl.range(0, NP, num_stages=1):
        both = ()  # B of the group's tokens, then C; every thread loads all of them, four numbers at a time
        for part in tl.static_range(2 * U // 4):
            four = n * (2 * U) + 4 * part + tl.arange(0, 4)
            both = both + _vectors(tl.load(bc + four[None, :] + 0 * channel[:, None]))
        h, dh, da_n, a_n = next_h, next_dh, next_da, next_a
        hs, fades = (h,), ()
        for j in tl.static_range(U):
            fade = tl.exp2(dts[j] * (a_n * LOG2E))
            h = tl.fma(fade, h, writes[j] * both[j])
            hs, fades = hs + (h,), fades + (fade,)
        following = tl.minimum(n + 1, NP - 1) * channels
        next_a = _load(a + following, mask)
        next_h = _load(states + following, mask & (k > 0))
        next_dh = _load(dstates + following, mask & has_later)
        next_da = _load(da + following, mask & has_later)
        new_dwrites, new_dspans, to_b, to_c = (), (), (), ()
        for j in tl.static_range(U - 1, -1, -1):
            dh = tl.fma(dys[j], both[U + j], dh)
            to_b, to_c = (dh * writes[j],) + to_b, (dys[j] * hs[j + 1],) + to_c
            new_dwrites = (dwrites[j] + dh * both[j],) + new_dwrites
            dh *= fades[j]
            q = dh * hs[j]  # the gradient of the exponent Δ · A
            da_n += q * dts[j]
            new_dspans = (dspans[j] + q * a_n,) + new_dspans
        dwrites, dspans = new_dwrites, new_dspans
        _store(dstates + n * channels, dh, mask)
        _store(da + n * channels, da_n, mask)
        total = tl.where(row[:, None] == n - 1, sums, total)  # one state late, without a wait for the product
        products = _columns(to_b + to_c)
        if EXACT:
            sums = tl.sum(products, 0)[None, :] + tl.zeros((ROWS, 2 * U), tl.float32)
        else:  # every row is the sum; two channels a row of ``pairs``: a thread then stores pairs of bfloat16
            pairs = tl.reshape(products.to(tl.bfloat16), (products.shape[0] // 2, 4 * U))
            doubled = tl.dot(tl.full((ROWS, products.shape[0] // 2), 1, tl.bfloat16), pairs)
            sums = tl.sum(tl.reshape(doubled, (ROWS, 2, 2 * U)), 1)
    total = tl.where(row[:, None] == NP - 1, sums, total)
    dd_e += prefetched * 0
    column = tl.arange(0, 2 * U)
    at = dbc + (SIGN * (column % U) * (2 * NP) + column // U * NP)[None, :] + row[:, None]
    tl.store(at, total, (row < NP)[:, None] & (column % U < remaining)[None, :])
    for j in tl.static_range(U):
        valid = mask & (j < remaining)
        u_t = _load(u + SIGN * j * channels, valid)
        raw = (dspans[j] + u_t * dwrites[j]) * _slope(dts[j], EXACT)
        dd_e += dys[j] * u_t
        dbias_e += raw
        _store(du + SIGN * j * channels, dts[j] * dwrites[j] + d_e * dys[j], valid)
        _store(ddelta + SIGN * j * channels, raw, valid)
    return dd_e, dbias_e


@triton.jit
def _direction(g: tl.constexpr, u, delta, a, bc, d, z, y, dy, states, du, ddelta, dz, dbc, dstates, da, dd, dbias,
               images, length, channels: tl.constexpr, stride_z: tl.constexpr, stride_dz: tl.constexpr, scale,
               BACKWARD: tl.constexpr, EXACT: tl.constexpr, NP: tl.constexpr, ROWS: tl.constexpr, CH: tl.constexpr,
               U: tl.constexpr):  # fmt: skip
    """The gradients of direction g of one image: groups of U positions from the last to the first."""
    e = tl.program_id(0) * CH + tl.arange(0, CH)
    mask = e < channels
    row = tl.program_id(1).to(tl.int64)
    groups = tl.cdiv(length, U)
    k = groups - 1
    first = length - 1 - k * U if BACKWARD else k * U
    token, image_token = row * length + first, (row - g * images) * length + first
    u += token * channels + e
    delta += token * channels + e
    du += token * channels + e
    ddelta += token * channels + e
    dbc += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) * length + token) * (2 * NP)
    z += image_token * stride_z + e
    dz += image_token * stride_dz + e
    y += image_token * channels + e
    dy += image_token * channels + e
    bc += (row * groups + k) * (2 * NP * U)
    states += (row * k + k - 1) * NP * channels + e  # none is saved before the first group
    dstates += row * NP * channels + e
    da += row * NP * channels + e
    a += g * NP * channels + e
    d_e = tl.load(d + g * channels + e, mask, 0)
    zero = tl.zeros((CH,), tl.float32)
    dd_e, dbias_e = zero, zero
    for i in range(groups):
        shift = ((k - i).to(tl.int64) - k) * (-U if BACKWARD else U)
        dd_e, dbias_e = _group(k - i, dd_e, dbias_e, u + shift * channels, delta + shift * channels, a,
                               bc - i * (2 * NP * U), z + shift * stride_z, y + shift * channels, dy + shift * channels,
                               states - i * (NP * channels), du + shift * channels, ddelta + shift * channels,
                               dz + shift * stride_dz, dbc + shift * (2 * NP), dstates, da, d_e, mask,
                               length - (k - i) * U, channels, stride_z, stride_dz, scale, i > 0, BACKWARD, g == 0,
                               EXACT, NP, ROWS, U)  # fmt: skip
    tl.store(dd + row * channels + e, dd_e, mask)
    tl.store(dbias + row * channels + e, dbias_e, mask)


@triton.jit(do_not_specialize=["length", "images"])
def _scan_from_states(u, delta, a, bc, d, z, y, dy, states, du, ddelta, dz, dbc, dstates, da, dd, dbias,
                      images, length, channels: tl.constexpr, stride_z: tl.constexpr, stride_dz: tl.constexpr, scale,
                      REVERSE: tl.constexpr, G: tl.constexpr, EXACT: tl.constexpr, NP: tl.constexpr,
                      ROWS: tl.constexpr, CH: tl.constexpr, U: tl.constexpr):  # fmt: skip
    for g in tl.static_range(G):
        if tl.program_id(1) // images == g:
            _direction(g, u, delta, a, bc, d, z, y, dy, states, du, ddelta, dz, dbc, dstates, da, dd, dbias, images,
                       length, channels, stride_z, stride_dz, scale, (REVERSE >> g) & 1, EXACT, NP, ROWS, CH,
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
    """The gradients of ``mtr_lab.ops.gpu.scan.scan`` without order, gap and delta_scale. Deterministic.

    Args:
        u: (G, B, L, E), contiguous.
        delta: Δ after bias and softplus, (G, B, L, E), contiguous.
        a: (G, N, E) float32.
        bc: B and C in reading order, (G, B, groups, N, 2, SAVE_EVERY) float32, 0 past the end.
        d: (G, E) float32.
        z: the gate, (B, L, E); copied unless its rows are contiguous and evenly spaced.
        y: the sum over directions before the gate, (B, L, E), contiguous: ``ungated`` of ``scan``.
        states: (G, B, groups - 1, N, E), contiguous: ``saved`` of ``scan``.
        grad: the gradient of the output, (B, L, E).
        dz: the gradient of ``z`` is written here, (B, L, E), rows contiguous and evenly spaced.
        reverse, scale: as for ``scan``.

    Returns:
        du: (G, B, L, E) in the dtype of ``u``.
        ddelta: the gradient of Δ before bias and softplus, (G, B, L, E) in the dtype of ``delta``.
        dbc: for B and C side by side, (parts, G, B, L, 2N) float32; the gradient is the sum over parts.
        da: (G, B, N, E) float32; the gradient is the sum over images, as for dd and dbias.
        dd: (G, B, E) float32.
        dbias: for the bias of Δ, (G, B, E) float32.
    """
    z = rows(z)
    directions, images, length, channels = u.shape
    padded = a.shape[1]
    blocks = triton.cdiv(channels, CHANNELS)
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dbc = u.new_empty(blocks, directions, images, length, 2 * padded, dtype=torch.float32)
    dstates, da = (u.new_empty(directions, images, padded, channels, dtype=torch.float32) for _ in range(2))
    dd, dbias = (u.new_empty(directions, images, channels, dtype=torch.float32) for _ in range(2))
    _scan_from_states[blocks, directions * images](
        u, delta, a, bc, d, z, y, grad.contiguous(), states, du, ddelta, dz, dbc, dstates, da, dd, dbias, images,
        length, channels, z.stride(1), dz.stride(1), scale, REVERSE=reverse_mask(reverse), G=directions,
        EXACT=u.dtype != torch.bfloat16 or INTERPRETED, NP=padded, ROWS=max(padded, 16), CH=CHANNELS, U=SAVE_EVERY,
        num_warps=CHANNELS // 32, **REGISTERS,
    )  # fmt: skip
    return du, ddelta, dbc, da, dd, dbias
