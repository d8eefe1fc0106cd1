"""How one program of the scan walks through tokens: device functions of ``scan`` and ``scan_chunks``.

A program is one warp. It owns some channels of one image, keeps their states in registers and loads U tokens at a time,
which the compiler prefetches through shared memory. Two limits bound the speed: the exponentials, one for each token,
channel, state and direction (a multiprocessor computes 16 a clock), and the instructions, five for each exponential.

``e`` numbers channels and ``t`` tokens. ``s`` is a position in the sequence: token ``order[s]``, or token s without an
order. A backward walk visits positions in decreasing order. NP is the number of states padded to a power of two, CH the
number of channels of a program. Tuples are made where they are passed: an assignment turns constants into tensors.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from mtr_lab.ops.gpu.formulas import LOG2E, growth, maximum, silu, softplus
from mtr_lab.ops.gpu.occupancy import STAGES, unstack

SAVE_EVERY = tl.constexpr(8)  # positions between two states that are saved for a backward pass, a multiple of U


class Channels(NamedTuple):
    """The channels of a program and their parameters."""

    e: Any
    mask: Any
    a: Any
    """(NP, CH): A / ln 2, so that exp(Δ A) is a power of 2."""
    d: Any
    bias: Any
    """The bias of Δ, which is added before softplus."""
    idle: Any
    """Δ of a token without input, softplus(bias): the state decays by it over a gap."""


class Direction(NamedTuple):
    """One direction of one image: pointers to its first token or position, and strides."""

    u: Any
    delta: Any
    bc: Any
    """B and C of a token side by side."""
    z: Any
    order: Any
    gap: Any
    factor: Any
    """Of each token: on Δ, or the number of equal tokens that it stands for."""
    y: Any
    sums: Any
    length: Any
    width: Any
    """The number of channels, the stride of u, delta and y from token to token."""
    stride_z: Any
    stride_bc: Any
    stride_sums: Any
    """The stride from one statistic to the next."""
    saved: Any
    """States for a backward pass: those before every ``SAVE_EVERY``-th position but the first; or ``None``.

    Four states of a channel are side by side, (groups - 1, NP / 4, width, 4)."""
    ungated: Any
    """The sum over directions before the gate, for a backward pass; or ``None``."""


class Options(NamedTuple):
    """Compile-time options of a walk, all constexpr."""

    backward: Any
    """The walk goes from the last position to the first."""
    first: Any
    """The first direction: y is written. Other directions add to it."""
    last: Any
    """The last direction: y is gated and scaled."""
    gate: Any
    softplus: Any
    """Bias and softplus are still to be applied to Δ."""
    gap: Any
    delta_scale: Any
    repeats: Any
    even: Any
    """All channels of every program exist: no masks."""


@triton.jit
def tile(x, e, width: tl.constexpr, NP: tl.constexpr, CH: tl.constexpr):
    """Pointers to the NP states of CH channels.

    With 32 channels or more, the hint of alignment makes the compiler give every thread one or two whole channels: a
    sum over states needs no shuffle. With fewer, S = 32 / CH threads share a channel; the rows are permuted so that
    every thread has neighbouring states.
    """
    S: tl.constexpr = min(max(32 // CH, 1), NP)
    n = tl.arange(0, NP)
    n = n % S * (NP // S) + n // S
    return tl.multiple_of(x + n[:, None] * width + e[None, :], (max(CH // 8, 4), max(CH // 8, 4)))


@triton.jit
def load_channels(a, d, bias, e, mask, width: tl.constexpr, SOFTPLUS: tl.constexpr, GAP: tl.constexpr,
                  NP: tl.constexpr, CH: tl.constexpr):  # fmt: skip
    """``Channels`` of one direction."""
    a2 = tl.load(tile(a, e, width, NP, CH), mask[None, :], 0) * LOG2E
    d_e = tl.load(d + e, mask, 0).to(tl.float32)
    bias_e, idle_e = d_e, d_e
    if SOFTPLUS:
        bias_e = tl.load(bias + e, mask, 0).to(tl.float32)
    if GAP:
        idle_e = softplus(tl.load(bias + e, mask, 0).to(tl.float32))
    return Channels(e, mask, a2, d_e, bias_e, idle_e)


@triton.jit
def _rows(x, s0, order, stride: tl.constexpr, SIGN: tl.constexpr, U: tl.constexpr):
    """Pointers to the tokens at U positions from s0 on, (U, 1)."""
    if order is None:
        return x + s0 * stride + tl.arange(0, U)[:, None] * (SIGN * stride)
    else:
        return x + tl.load(order + s0 + tl.arange(0, U))[:, None] * stride


@triton.jit
def _tokens(x, s0, order, channels, stride: tl.constexpr, SIGN: tl.constexpr, EVEN: tl.constexpr, U: tl.constexpr):
    """The channels of U tokens, U times (CH,)."""
    at = _rows(x, s0, order, stride, SIGN, U) + channels.e[None, :]
    return unstack(tl.load(at) if EVEN else tl.load(at, channels.mask[None, :], 0), U)


@triton.jit
def _states(bc, s0, order, stride: tl.constexpr, SIGN: tl.constexpr, NP: tl.constexpr, U: tl.constexpr):
    """B and C of U tokens side by side, U times (2 NP,)."""
    return unstack(tl.load(_rows(bc, s0, order, stride, SIGN, U) + tl.arange(0, 2 * NP)[None, :]), U)


@triton.jit
def _b_and_c(bc, NP: tl.constexpr, CH: tl.constexpr):
    """B and C of one token, permuted as the rows of ``tile``."""
    S: tl.constexpr = min(max(32 // CH, 1), NP)
    b, c = tl.split(tl.permute(tl.reshape(bc.to(tl.float32), (2, S, NP // S)), (2, 1, 0)))
    return tl.reshape(b, (NP,)), tl.reshape(c, (NP,))


@triton.jit
def _timescale(delta_t, channels, factor, t, SOFTPLUS: tl.constexpr, DELTA_SCALE: tl.constexpr):
    dt = delta_t.to(tl.float32)
    if SOFTPLUS:
        dt = tl.where(channels.mask, softplus(dt + channels.bias), 0)
    if DELTA_SCALE:
        dt *= tl.load(factor + t)
    return dt


@triton.jit
def _run(dt, factor, t, REPEATS: tl.constexpr):
    """Δ of all equal tokens that token t stands for, given that of one."""
    if REPEATS:
        dt *= tl.load(factor + t)
    return dt


@triton.jit
def _update(write, b_t, dt, channels, factor, t, REPEATS: tl.constexpr):
    """The update of the state (NP, CH) by token t; ``write`` is Δ u of one of the tokens that it stands for."""
    update = write[None, :] * b_t[:, None]
    if REPEATS:
        update *= growth(dt[None, :] * channels.a, tl.load(factor + t))
    return update


@triton.jit
def _with_gap(dt, idle, gap, s, length, BACKWARD: tl.constexpr, GAP: tl.constexpr):
    """Δ plus the decay over the gap in front of position s. Gaps are in reading order."""
    if GAP:
        dt += tl.load(gap + (length - 1 - s if BACKWARD else s)).to(tl.float32) * idle
    return dt


@triton.jit
def _save(x, h, channels, width: tl.constexpr):
    """Store states for a backward pass, in a tensor (NP / 4, width, 4)."""
    N: tl.constexpr = h.shape[0] // 4
    states = tl.permute(tl.reshape(h.to(x.dtype.element_ty), (N, 4, h.shape[1])), (0, 2, 1))
    at = x + (tl.arange(0, N)[:, None, None] * width + channels.e[None, :, None]) * 4 + tl.arange(0, 4)[None, None, :]
    tl.store(at, states, channels.mask[None, :, None])


@triton.jit
def _walk(h, direction, channels, terms, first, count, scale, options, U: tl.constexpr):
    """Scan ``count`` positions, a multiple of U, beginning with ``first``; h is the state before it, (NP, CH)."""
    SIGN: tl.constexpr = -1 if options.backward else 1
    order = direction.order
    for i in tl.range(0, count, U, num_stages=STAGES):
        s0 = first + SIGN * i
        if direction.saved is not None:
            passed = direction.length - 1 - s0 if options.backward else s0
            if (passed % SAVE_EVERY == 0) & (passed > 0):
                at = direction.saved + (passed // SAVE_EVERY - 1) * h.shape[0] * direction.width
                _save(at, h, channels, direction.width)
        us = _tokens(direction.u, s0, order, channels, direction.width, SIGN, options.even, U)
        dts = _tokens(direction.delta, s0, order, channels, direction.width, SIGN, options.even, U)
        bcs = _states(direction.bc, s0, order, direction.stride_bc, SIGN, h.shape[0], U)
        ys, zs = us, us
        if not options.first:
            ys = _tokens(direction.y, s0, order, channels, direction.width, SIGN, options.even, U)
        if options.last and options.gate:
            zs = _tokens(direction.z, s0, order, channels, direction.stride_z, SIGN, options.even, U)
        y_at = direction.y + s0 * direction.width + channels.e
        for k in tl.static_range(U):
            s = s0 + SIGN * k
            t = s if order is None else tl.load(order + s)
            dt = _timescale(dts[k], channels, direction.factor, t, options.softplus, options.delta_scale)
            u_t = us[k].to(tl.float32)
            b_t, c_t = _b_and_c(bcs[k], h.shape[0], h.shape[1])
            one = dt
            dt = _run(one, direction.factor, t, options.repeats)
            span = _with_gap(dt, channels.idle, direction.gap, s, direction.length, options.backward, options.gap)
            fade = tl.exp2(span[None, :] * channels.a)
            h = fade * h + _update(one * u_t, b_t, one, channels, direction.factor, t, options.repeats)
            y_t = channels.d * u_t + tl.sum(h * c_t[:, None], 0)
            at = direction.sums + t * tl.num_programs(0) + tl.program_id(0)
            for i in tl.static_range(len(terms)):
                tl.store(at + i * direction.stride_sums, tl.sum(terms[i](dt, u_t, y_t, maximum), 0))
            if not options.first:
                y_t += ys[k].to(tl.float32)
            if options.last and direction.ungated is not None:
                ungated = direction.ungated + t * direction.width + channels.e
                tl.store(ungated, y_t.to(direction.ungated.dtype.element_ty), channels.mask)
            if options.last and options.gate:
                y_t *= scale * silu(zs[k].to(tl.float32))
            elif options.last:
                y_t *= scale
            out = y_at + SIGN * k * direction.width if order is None else direction.y + t * direction.width + channels.e
            if options.even:
                tl.store(out, y_t.to(direction.y.dtype.element_ty))
            else:
                tl.store(out, y_t.to(direction.y.dtype.element_ty), channels.mask)
    return h


@triton.jit
def walk(h, direction, channels, terms, start, end, scale, options, U: tl.constexpr):
    """Scan positions ``start`` to ``end - 1``, in a backward walk from ``end - 1`` down to ``start``.

    h is the state before the first position visited; returns the state after the last one.
    """
    whole = (end - start) // U * U
    if whole > 0:
        first = end - 1 if options.backward else start
        h = _walk(h, direction, channels, terms, first, whole, scale, options, U)
    if whole < end - start:
        first = end - 1 - whole if options.backward else start + whole
        h = _walk(h, direction, channels, terms, first, end - start - whole, scale, options, 1)
    return h


@triton.jit
def _walk_states(h, total, direction, channels, first, count, options, U: tl.constexpr):
    """``_walk`` without an output: the state after, and ``total`` plus the sum of Δ with gaps."""
    SIGN: tl.constexpr = -1 if options.backward else 1
    order = direction.order
    for i in tl.range(0, count, U, num_stages=STAGES):
        s0 = first + SIGN * i
        us = _tokens(direction.u, s0, order, channels, direction.width, SIGN, options.even, U)
        dts = _tokens(direction.delta, s0, order, channels, direction.width, SIGN, options.even, U)
        bcs = _states(direction.bc, s0, order, direction.stride_bc, SIGN, h.shape[0], U)
        for k in tl.static_range(U):
            s = s0 + SIGN * k
            t = s if order is None else tl.load(order + s)
            dt = _timescale(dts[k], channels, direction.factor, t, options.softplus, options.delta_scale)
            one, write = dt, dt * us[k].to(tl.float32)
            dt = _run(one, direction.factor, t, options.repeats)
            dt = _with_gap(dt, channels.idle, direction.gap, s, direction.length, options.backward, options.gap)
            b_t, _ = _b_and_c(bcs[k], h.shape[0], h.shape[1])
            fade = tl.exp2(dt[None, :] * channels.a)
            h = fade * h + _update(write, b_t, one, channels, direction.factor, t, options.repeats)
            total += dt
    return h, total


@triton.jit
def walk_states(h, total, direction, channels, start, count, options, U: tl.constexpr):
    """``walk`` without an output: the state after ``count`` positions, and ``total`` plus the sum of Δ with gaps."""
    whole = count // U * U
    first = start + count - 1 if options.backward else start
    h, total = _walk_states(h, total, direction, channels, first, whole, options, U)
    first = first - whole if options.backward else first + whole
    return _walk_states(h, total, direction, channels, first, count - whole, options, 1)
