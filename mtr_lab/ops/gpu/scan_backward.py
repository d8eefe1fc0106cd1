"""The gradients of the selective scan: the recurrence backwards in time, one launch for all directions.

A program is one warp. It owns up to 32 channels of one direction of one image, with all their states, and a segment of
the sequence: the whole sequence, unless the batch is too small to fill the GPU.

The backward recurrence needs the forward states in reverse. Storing all of them would take memory for L tokens; a
program takes memory for 2√L. It first scans its segment and stores the state at the start of every chunk of about √L
tokens. Then it goes over the chunks from the last to the first: it scans the chunk again into a buffer of its states,
and reads the buffer backwards.

With several segments, two short launches come first. They compute what each segment passes on: the state, to the next
segment in reading order, and the gradient of the state, to the one before.

The compiler gives a thread 4 channels times 4 states. With one channel and its 16 states a thread, sums over states
would stay within the thread, but the sums over channels, for the gradients of B and C, would cross more threads.

Deterministic: each program writes its part of the sums over channels and images; the parts are added afterwards.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.formulas import LOG2E, softplus
from mtr_lab.ops.gpu.occupancy import STAGES, on_its_device, registers, resident_warps, reverse_mask, rows, unstack
from mtr_lab.ops.gpu.scan_chunks import CHANNELS, chunk_states
from mtr_lab.ops.scan_inputs import ScanInputs

STATES = 512  # a program's channels times states, 16 a thread: what fits the registers of one warp
MAX_SEGMENTS = 24  # of a sequence: each program adds up what the others pass on
MIN_SEGMENT = 32  # tokens
FORWARDS = 4  # tokens loaded at a time in the forward walk
BACKWARDS = 2  # and in the backward walk, which also loads their states
REGISTERS = registers(240)  # 8 warps fit a Hopper multiprocessor; 168 registers, for 12 warps, are slower
# Not specialised on these, so that other sizes do not trigger recompiles.
VARYING = ["length", "segment", "chunk", "images", "reverse"]


@on_its_device
def selective_scan_backward(inputs: ScanInputs, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of ``selective_scan_reference`` with respect to its first eight inputs. Deterministic.

    Data is float32, float16 or bfloat16, parameters are of any floating dtype; states and sums are float32.

    Args:
        inputs: as for ``selective_scan``. ``z`` is copied unless its rows are contiguous and evenly spaced.
        grad_y: the gradient of the output, (B, L, E).

    Returns:
        The gradients of u, delta, A, B, C, D, z and delta_bias in their shapes and dtypes; ``None`` for an absent one.
    """
    u, delta, A, B, C, D, z, delta_bias, order, gap, delta_scale, _, reverse = inputs
    directions, images, length, channels = u.shape
    states = A.shape[2]
    padded = triton.next_power_of_2(states)
    more = padded - states  # states that stay zero
    u, delta, grad_y = (t.contiguous() for t in (u, delta, grad_y))
    a = F.pad(A.float().transpose(1, 2), (0, 0, 0, more)).contiguous()
    bc = torch.cat([F.pad(B, (0, more)), F.pad(C, (0, more))], dim=3)
    d = D.contiguous()
    optional = delta_bias, order, gap, delta_scale
    bias, order, gap, delta_scale = (None if t is None else t.contiguous() for t in optional)
    gate = None if z is None else rows(z)

    block = max(1, min(32, STATES // padded))
    blocks = triton.cdiv(channels, block)
    wanted = min(resident_warps(u.device) // max(blocks * images * directions, 1), MAX_SEGMENTS, length // MIN_SEGMENT)
    segment = triton.cdiv(length, max(wanted, 1))
    segments = triton.cdiv(length, segment)
    chunk = FORWARDS * triton.cdiv(math.isqrt(segment), FORWARDS)
    grid = (blocks, directions * images, segments)
    programs = blocks * directions * images * segments
    starts = u.new_empty(programs, triton.cdiv(segment, chunk), padded, block, dtype=torch.float32)
    arrivals = u.new_empty(programs, chunk, padded, block, dtype=torch.float32)

    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dz = None if z is None else z.new_empty(u.shape)
    dbc = u.new_empty(blocks, directions, images, length, 2 * padded, dtype=torch.float32)
    parts = directions, images * segments
    da = u.new_empty(*parts, padded, channels, dtype=torch.float32)
    dd, dbias = (u.new_empty(*parts, channels, dtype=torch.float32) for _ in range(2))

    shape = {
        "images": images,
        "length": length,
        "channels": channels,
        "segment": segment,
        "reverse": reverse_mask(reverse),
    }
    strides = *bc.stride()[:3], 0 if gate is None else gate.stride(1)
    before = after = spans = None
    if segments > 1:
        before, spans = chunk_states(u, delta, a, bc, d, bias, order, gap, delta_scale, reverse, segment, softplus=True)
        after = torch.empty_like(before)
        _segment_gradients[triton.cdiv(channels, CHANNELS), directions * images, segments](
            delta, a, bc, gate, bias, order, gap, delta_scale, grad_y, after, *strides, **shape,
            NP=padded, BLOCK=CHANNELS, U=FORWARDS, num_warps=1,
        )  # fmt: skip
    _scan_backward[grid](
        u, delta, a, bc, d, gate, bias, order, gap, delta_scale, grad_y, before, after, spans, starts, arrivals,
        du, ddelta, da, dbc, dd, dz, dbias, *strides, **shape, chunk=chunk, NP=padded, BLOCK=block, FORWARDS=FORWARDS,
        BACKWARDS=BACKWARDS, num_warps=1, **REGISTERS,
    )  # fmt: skip
    db, dc = dbc.sum(0).split(padded, dim=3)
    return (
        du,
        ddelta,
        da.sum(1)[:, :states].transpose(1, 2).to(A.dtype).contiguous(),
        db[..., :states].to(B.dtype).contiguous(),
        dc[..., :states].to(C.dtype).contiguous(),
        dd.sum(1).to(D.dtype),
        None if dz is None else dz.sum(0),
        None if delta_bias is None else dbias.sum(1).to(delta_bias.dtype),
    )


@triton.jit
def _program(length, images, segment, reverse, BLOCK: tl.constexpr):
    """This program's direction, row ``direction · B + image``, image, channels, segment (start, end), step (1 or -1).

    Row and image have 64 bits, and so have the offsets computed from them: a tensor may have over 2³¹ elements.
    """
    row = tl.program_id(1).to(tl.int64)
    g = tl.program_id(1) // images
    start = tl.program_id(2) * segment
    end = tl.minimum(start + segment, length)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return g, row, row % images, e, start, end, 1 - 2 * ((reverse >> g) & 1)


@triton.jit
def _weights(a, bias, g, e, n, mask, channels, NP: tl.constexpr):
    """A log2(e), (N, channels), so that exp(Δ A) is a power of 2; the bias; Δ of a token without input."""
    a2 = tl.load(a + (g * NP + n[:, None]) * channels + e[None, :], mask[None, :], 0) * LOG2E
    bias_e = tl.zeros(e.shape, tl.float32)
    if bias is not None:
        bias_e = tl.load(bias + g * channels + e, mask, 0).to(tl.float32)
    return a2, bias_e, softplus(bias_e)


@triton.jit
def _token(order, s, in_segment):
    """The token at position s: ``order[s]``, or s without an order."""
    return s if order is None else tl.load(order + s, in_segment, 0)


@triton.jit
def _tokens(x, order, s0, step, start, end, stride, column, mask, U: tl.constexpr):
    """The columns ``column`` of U tokens from position s0 on; zeros outside the segment."""
    s = s0 + step * tl.arange(0, U)
    in_segment = (s >= start) & (s < end)
    t = _token(order, s, in_segment)
    return unstack(tl.load(x + t[:, None] * stride + column[None, :], in_segment[:, None] & mask[None, :], 0), U)


@triton.jit
def _timescale(raw, bias_e, idle, gap, delta_scale, s, t, step, in_segment, length):
    """Δ before and after softplus, its scale, the gap before position s, and the span of the state's decay."""
    x = raw.to(tl.float32) + bias_e
    dt = tl.where(in_segment, softplus(x), 0)
    delta_scale_t = 1.0
    if delta_scale is not None:
        delta_scale_t = tl.load(delta_scale + t, in_segment, 0).to(tl.float32)
        dt *= delta_scale_t
    gap_t = 0.0
    span = dt
    if gap is not None:
        gap_t = tl.load(gap + tl.where(step > 0, s, length - 1 - s), in_segment, 0).to(tl.float32)
        span += gap_t * idle
    return x, dt, delta_scale_t, gap_t, span


@triton.jit
def _walk(h, kept, u, delta, bc, order, gap, delta_scale, first, step, start, end, bc_l, length, channels, chunk, e, n,
          mask, a2, bias_e, idle, tile, KEEP: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr,
          U: tl.constexpr):  # fmt: skip
    """The state after a chunk of tokens. With ``KEEP``, the state before each token is stored in ``kept``."""
    for i in tl.range(0, chunk, U, num_stages=STAGES):
        s0 = first + step * i
        us = _tokens(u, order, s0, step, start, end, channels, e, mask, U)
        deltas = _tokens(delta, order, s0, step, start, end, channels, e, mask, U)
        bs = _tokens(bc, order, s0, step, start, end, bc_l, n, n < NP, U)
        for j in tl.static_range(U):
            s = s0 + step * j
            if KEEP:
                tl.store(kept + (i + j) * NP * BLOCK + tile, h)
            in_segment = (s >= start) & (s < end)
            t = _token(order, s, in_segment)
            _, dt, _, _, span = _timescale(deltas[j], bias_e, idle, gap, delta_scale, s, t, step, in_segment, length)
            write = dt * us[j].to(tl.float32)
            h = tl.exp2(span[None, :] * a2) * h + write[None, :] * bs[j].to(tl.float32)[:, None]
    return h


@triton.jit(do_not_specialize=VARYING)
def _segment_gradients(delta, a, bc, z, bias, order, gap, delta_scale, dy, after, bc_g, bc_i, bc_l, z_l,
                    images, length, channels, segment, reverse,
                    NP: tl.constexpr, BLOCK: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """The gradient of the state before a segment, for a zero gradient of the state after it."""
    g, row, image, e, start, end, step = _program(length, images, segment, reverse, BLOCK)
    n = tl.arange(0, NP)
    mask = e < channels
    a2, bias_e, idle = _weights(a, bias, g, e, n, mask, channels, NP)
    delta += row * length * channels
    dy += image * length * channels
    bc += g * bc_g + image * bc_i
    if z is not None:
        z += image * length * z_l
    if order is not None:
        order += row * length
    if gap is not None:
        gap += (image * (tl.num_programs(1) // images) + g) * length
    if delta_scale is not None:
        delta_scale += image * length
    last = tl.where(step > 0, end - 1, start)
    dh = tl.zeros((NP, BLOCK), tl.float32)
    for i in tl.range(0, end - start, U, num_stages=STAGES):
        s0 = last - step * i
        deltas = _tokens(delta, order, s0, -step, start, end, channels, e, mask, U)
        dys = _tokens(dy, order, s0, -step, start, end, channels, e, mask, U)
        cs = _tokens(bc + NP, order, s0, -step, start, end, bc_l, n, n < NP, U)
        zs = dys
        if z is not None:
            zs = _tokens(z, order, s0, -step, start, end, z_l, e, mask, U)
        for j in tl.static_range(U):
            s = s0 - step * j
            in_segment = (s >= start) & (s < end)
            t = _token(order, s, in_segment)
            _, _, _, _, span = _timescale(deltas[j], bias_e, idle, gap, delta_scale, s, t, step, in_segment, length)
            dy_t = dys[j].to(tl.float32)
            if z is not None:
                z_t = zs[j].to(tl.float32)
                dy_t *= z_t * tl.sigmoid(z_t)
            dh = tl.exp2(span[None, :] * a2) * (dh + dy_t[None, :] * cs[j].to(tl.float32)[:, None])
    at = (row * tl.num_programs(2) + tl.program_id(2)) * NP
    tl.store(after + (at + n[:, None]) * channels + e[None, :], dh, mask[None, :])


@triton.jit
def _add_segment(left, spans, row, other, e, n, mask, channels, a2, h, NP: tl.constexpr):
    """h decayed over one more segment, plus what the segment passes on."""
    at = row * tl.num_programs(2) + other
    fade = tl.exp2(tl.load(spans + at * channels + e, mask, 0)[None, :] * a2)
    return fade * h + tl.load(left + (at * NP + n[:, None]) * channels + e[None, :], mask[None, :], 0)


@triton.jit(do_not_specialize=VARYING)
def _scan_backward(u, delta, a, bc, d, z, bias, order, gap, delta_scale, dy, before, after, spans, starts, arrivals,
                   du, ddelta, da, dbc, dd, dz, dbias, bc_g, bc_i, bc_l, z_l,
                   images, length, channels, segment, reverse, chunk,
                   NP: tl.constexpr, BLOCK: tl.constexpr, FORWARDS: tl.constexpr, BACKWARDS: tl.constexpr):  # fmt: skip
    g, row, image, e, start, end, step = _program(length, images, segment, reverse, BLOCK)
    n = tl.arange(0, NP)
    mask = e < channels
    a2, bias_e, idle = _weights(a, bias, g, e, n, mask, channels, NP)
    d_e = tl.load(d + g * channels + e, mask, 0).to(tl.float32)
    first_token = row * length
    u += first_token * channels
    delta += first_token * channels
    du += first_token * channels
    ddelta += first_token * channels
    dy += image * length * channels
    bc += g * bc_g + image * bc_i
    if z is not None:
        z += image * length * z_l
        dz += first_token * channels
    if order is not None:
        order += row * length
    if gap is not None:
        gap += (image * (tl.num_programs(1) // images) + g) * length
    if delta_scale is not None:
        delta_scale += image * length
    dbc += (tl.program_id(0) * tl.num_programs(1) + row) * length * 2 * NP
    tile = n[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    chunks = tl.cdiv(end - start, chunk)
    part = row * tl.num_programs(2) + tl.program_id(2)
    number = part * tl.num_programs(0) + tl.program_id(0)
    starts += number * tl.cdiv(segment, chunk) * NP * BLOCK
    arrivals += number * chunk * NP * BLOCK

    h = tl.zeros((NP, BLOCK), tl.float32)
    dh = tl.zeros((NP, BLOCK), tl.float32)
    if before is not None:
        others = tl.num_programs(2) - 1
        earlier = tl.where(step > 0, tl.program_id(2), others - tl.program_id(2))
        for other in range(earlier):
            place = tl.where(step > 0, other, others - other)
            h = _add_segment(before, spans, row, place, e, n, mask, channels, a2, h, NP)
        for other in range(others - earlier):
            place = tl.where(step > 0, others - other, other)
            dh = _add_segment(after, spans, row, place, e, n, mask, channels, a2, dh, NP)
    origin = tl.where(step > 0, start, end - 1)
    for k in range(chunks - 1):
        tl.store(starts + k * NP * BLOCK + tile, h)
        h = _walk(h, arrivals, u, delta, bc, order, gap, delta_scale, origin + step * k * chunk, step, start, end, bc_l,
                  length, channels, chunk, e, n, mask, a2, bias_e, idle, tile, False, NP, BLOCK,
                  FORWARDS)  # fmt: skip
    tl.store(starts + (chunks - 1) * NP * BLOCK + tile, h)
    tl.debug_barrier()  # a state may be read by a thread that did not write it

    da_e = tl.zeros((NP, BLOCK), tl.float32)
    dd_e = tl.zeros((BLOCK,), tl.float32)
    dbias_e = tl.zeros((BLOCK,), tl.float32)
    didle_e = tl.zeros((BLOCK,), tl.float32)
    for k in range(chunks - 1, -1, -1):
        first = origin + step * k * chunk
        h = tl.load(starts + k * NP * BLOCK + tile)
        h = _walk(h, arrivals, u, delta, bc, order, gap, delta_scale, first, step, start, end, bc_l, length, channels,
                  chunk, e, n, mask, a2, bias_e, idle, tile, True, NP, BLOCK, FORWARDS)  # fmt: skip
        tl.debug_barrier()
        for i in tl.range(0, chunk, BACKWARDS, num_stages=STAGES):
            s0 = first + step * (chunk - 1 - i)
            us = _tokens(u, order, s0, -step, start, end, channels, e, mask, BACKWARDS)
            deltas = _tokens(delta, order, s0, -step, start, end, channels, e, mask, BACKWARDS)
            dys = _tokens(dy, order, s0, -step, start, end, channels, e, mask, BACKWARDS)
            bs = _tokens(bc, order, s0, -step, start, end, bc_l, n, n < NP, BACKWARDS)
            cs = _tokens(bc + NP, order, s0, -step, start, end, bc_l, n, n < NP, BACKWARDS)
            zs = dys
            if z is not None:
                zs = _tokens(z, order, s0, -step, start, end, z_l, e, mask, BACKWARDS)
            for j in tl.static_range(BACKWARDS):
                # h is the state after token t, arrival the state before it.
                arrival = tl.load(arrivals + (chunk - 1 - i - j) * NP * BLOCK + tile)
                s = s0 - step * j
                in_segment = (s >= start) & (s < end)
                t = _token(order, s, in_segment)
                x, dt, delta_scale_t, gap_t, span = _timescale(
                    deltas[j], bias_e, idle, gap, delta_scale, s, t, step, in_segment, length
                )
                u_t, dy_t = us[j].to(tl.float32), dys[j].to(tl.float32)
                b_t, c_t = bs[j].to(tl.float32)[:, None], cs[j].to(tl.float32)[:, None]
                write = dt * u_t
                at = t * channels + e
                if z is not None:
                    z_t = zs[j].to(tl.float32)
                    gate = tl.sigmoid(z_t)
                    y = tl.sum(h * c_t, 0) + d_e * u_t
                    tl.store(
                        dz + at, (dy_t * y * gate * (1 + z_t * (1 - gate))).to(dz.dtype.element_ty), mask & in_segment
                    )
                    dy_t *= z_t * gate
                dh += dy_t[None, :] * c_t
                tl.store(dbc + t * 2 * NP + n, tl.sum(dh * write[None, :], 1), (n < NP) & in_segment)
                tl.store(dbc + t * 2 * NP + NP + n, tl.sum(dy_t[None, :] * h, 1), (n < NP) & in_segment)
                dwrite = tl.sum(dh * b_t, 0)
                dh *= tl.exp2(span[None, :] * a2)
                q = dh * arrival  # the gradient of the exponent span · A
                da_e += q * span[None, :]
                dspan = tl.sum(q * a2, 0) * 0.6931471805599453
                ddelta_t = tl.where(in_segment, (dspan + u_t * dwrite) * delta_scale_t * tl.sigmoid(x), 0)
                didle_e += gap_t * dspan
                dd_e += dy_t * u_t
                dbias_e += ddelta_t
                tl.store(du + at, (dt * dwrite + d_e * dy_t).to(du.dtype.element_ty), mask & in_segment)
                tl.store(ddelta + at, ddelta_t.to(ddelta.dtype.element_ty), mask & in_segment)
                h = arrival
        tl.debug_barrier()
    tl.store(da + (part * NP + n[:, None]) * channels + e[None, :], da_e, mask[None, :])
    tl.store(dd + part * channels + e, dd_e, mask)
    tl.store(dbias + part * channels + e, dbias_e + didle_e * tl.sigmoid(bias_e), mask)
