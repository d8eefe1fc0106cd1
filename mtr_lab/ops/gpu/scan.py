"""The selective scan as Triton kernels: every direction of a block, skip, gate and their sum.

A program, one warp, owns one image and some channels, and walks through tokens that are read ahead of their turn, a few
at once, through shared memory. What bounds a kernel are the exponentials, one for each token, channel, state and
direction, of which a multiprocessor computes 16 a clock, and next to them the instructions: five for each of the same.

There are three forms, for a GPU is to be filled by any number of images. Many are scanned whole, one direction after
the other, two channels a thread, so that what is read of B and C serves both. Few, of two opposite directions, are
scanned by a program for each direction, in two launches: in the first both walk to the middle, in the second each adds
to what the other has left behind. Hardly any are scanned in chunks of tokens, which is twice.

Tokens are read in their order or in its reverse; with an ``order``, by number: the kernels are then others, compiled
apart.
"""

from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.launch import (
    INTERPRETED,
    STAGES,
    fill,
    on_its_device,
    processors,
    registers,
    reverse_mask,
    rows,
    unstack,
)
from mtr_lab.ops.scan_inputs import ScanInputs
from mtr_lab.ops.statistics import STATISTICS

LOG2E = tl.constexpr(1.4426950408889634)
CHANNELS = 64  # of a program, which is one warp
UNROLL = 4  # tokens that are read at once
UNROLL_HALF = 8  # the same, of ``_scan_half``, whose programs have fewer beside them
KEPT = tl.constexpr(8)  # tokens from one state that is kept for a backward pass to the next
REGISTERS = registers(168)  # 128 and 104, for more warps beside each other, are slower
LEAST_ROOM = 5  # for walks beside each other: with less, scanning in chunks, which is twice, costs more than it hides
CHUNKS = 24  # of a sequence that is split, at most: each program sums up the ones before its own
MIN_CHUNK = 8  # tokens: below, the second pass over them costs more than it hides


@triton.jit
def softplus(x):
    """log(1 + exp(x)); log(1 + w) is w times a polynomial in w, Chebyshev fit on [0, 1], relative error below 3e-7."""
    w = tl.exp2(-tl.abs(x) * LOG2E)
    p = -0.008336497470736504 * w + 0.04337085038423538
    p = p * w - 0.10667790472507477
    p = p * w + 0.1767549365758896
    p = p * w - 0.2447046935558319
    p = p * w + 0.3327118754386902
    p = p * w - 0.49997127056121826
    p = p * w + 0.9999997615814209
    return tl.maximum(x, 0) + w * p


@cache
def _compiled(term: Callable[..., Any]) -> Any:
    if INTERPRETED:  # which finds the language it has to patch among a function's globals
        term = FunctionType(term.__code__, term.__globals__ | {"tl": tl})
    return triton.jit(term)


def terms(stats: Sequence[str]) -> tuple[Any, ...]:
    """The formulas of statistics as functions that a kernel, given them as an argument, calls."""
    return tuple(_compiled(STATISTICS[name].term) for name in stats)


@triton.jit
def maximum(x, y):
    """What the formulas of statistics are given."""
    return tl.maximum(x, y)


@triton.jit
def _timescale(delta_t, there, bias_e, stretch, t, SOFTPLUS: tl.constexpr, STRETCH: tl.constexpr):
    dt = delta_t.to(tl.float32)
    if SOFTPLUS:
        dt = tl.where(there, softplus(dt + bias_e), 0)
    if STRETCH:
        dt *= tl.load(stretch + t)
    return dt


@triton.jit
def _decay(dt, idle_e, gap, s, length, BACK: tl.constexpr, GAP: tl.constexpr):
    """Δ with the gap that is crossed just before; s counts from the first token, whichever is read first."""
    if GAP:
        dt += tl.load(gap + (length - 1 - s if BACK else s)).to(tl.float32) * idle_e
    return dt


@triton.jit
def _tile(x, e, channels: tl.constexpr, NP: tl.constexpr, CH: tl.constexpr):
    """Pointers to all states of the channels. A thread is to hold whole channels, one or two beside each other, so that
    the sum over states needs no other thread; the compiler decides so if it may load as many numbers at a time. Of less
    than 32 channels S threads share one, by turns: rows are in an order in which each has states beside each other."""
    S: tl.constexpr = min(max(32 // CH, 1), NP)
    n = tl.arange(0, NP)
    n = n % S * (NP // S) + n // S
    return tl.multiple_of(x + n[:, None] * channels + e[None, :], (max(CH // 8, 4), max(CH // 8, 4)))


@triton.jit
def _constants(a, d, bias, e, inside, channels: tl.constexpr, SOFTPLUS: tl.constexpr, GAP: tl.constexpr,
               NP: tl.constexpr, CH: tl.constexpr):  # fmt: skip
    a2 = tl.load(_tile(a, e, channels, NP, CH), inside[None, :], 0) * LOG2E
    d_e = tl.load(d + e, inside, 0).to(tl.float32)
    bias_e, idle_e = d_e, d_e
    if SOFTPLUS:
        bias_e = tl.load(bias + e, inside, 0).to(tl.float32)
    if GAP:
        idle_e = softplus(tl.load(bias + e, inside, 0).to(tl.float32))
    return a2, d_e, bias_e, idle_e


@triton.jit
def _rows(x, s0, order, step: tl.constexpr, SIGN: tl.constexpr, U: tl.constexpr):
    """Pointers to U tokens of ``step`` elements, (U, 1): from s0 on by ``SIGN``, or those that ``order`` has there."""
    if order is None:
        return x + s0 * step + tl.arange(0, U)[:, None] * (SIGN * step)
    else:
        return x + tl.load(order + s0 + tl.arange(0, U))[:, None] * step


@triton.jit
def _tokens(x, s0, order, e, inside, step: tl.constexpr, SIGN: tl.constexpr, EVEN: tl.constexpr, U: tl.constexpr):
    """Channels of U tokens."""
    at = _rows(x, s0, order, step, SIGN, U) + e[None, :]
    return unstack(tl.load(at) if EVEN else tl.load(at, inside[None, :], 0), U)


@triton.jit
def _states(bc, s0, order, step: tl.constexpr, SIGN: tl.constexpr, NP: tl.constexpr, U: tl.constexpr):
    """B and C side by side of U tokens."""
    return unstack(tl.load(_rows(bc, s0, order, step, SIGN, U) + tl.arange(0, 2 * NP)[None, :]), U)


@triton.jit
def _b_and_c(bc, NP: tl.constexpr, CH: tl.constexpr):
    """B and C of one token in the order of the rows of ``_tile``."""
    S: tl.constexpr = min(max(32 // CH, 1), NP)
    b, c = tl.split(tl.permute(tl.reshape(bc.to(tl.float32), (2, S, NP // S)), (2, 1, 0)))
    return tl.reshape(b, (NP,)), tl.reshape(c, (NP,))


@triton.jit
def _walk(h, u, delta, bc, z, order, gap, stretch, y, sums, terms, kept, ungated, e, inside, first, count, length, a2,
          d_e, bias_e, idle_e, channels: tl.constexpr, step_z: tl.constexpr, step_t: tl.constexpr, step_k, scale,
          BACK: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, GATE: tl.constexpr, SOFTPLUS: tl.constexpr,
          GAP: tl.constexpr, STRETCH: tl.constexpr, EVEN: tl.constexpr, NP: tl.constexpr,
          U: tl.constexpr):  # fmt: skip
    """Scan ``count`` tokens from ``first`` on, U at a time, which divides their number."""
    SIGN: tl.constexpr = -1 if BACK else 1
    for i in tl.range(0, count, U, num_stages=STAGES):
        s0 = first + SIGN * i
        if kept is not None:
            passed = length - 1 - s0 if BACK else s0
            if (passed % KEPT == 0) & (passed > 0):
                at = kept + (passed // KEPT - 1) * NP * channels
                tl.store(_tile(at, e, channels, NP, h.shape[1]), h.to(kept.dtype.element_ty), inside[None, :])
        us = _tokens(u, s0, order, e, inside, channels, SIGN, EVEN, U)
        dts = _tokens(delta, s0, order, e, inside, channels, SIGN, EVEN, U)
        bcs = _states(bc, s0, order, step_t, SIGN, NP, U)
        ys, zs = us, us
        if not FIRST:
            ys = _tokens(y, s0, order, e, inside, channels, SIGN, EVEN, U)
        if LAST and GATE:
            zs = _tokens(z, s0, order, e, inside, step_z, SIGN, EVEN, U)
        y_at = y + s0 * channels + e
        for k in tl.static_range(U):
            s = s0 + SIGN * k
            t = s if order is None else tl.load(order + s)
            dt = _timescale(dts[k], inside, bias_e, stretch, t, SOFTPLUS, STRETCH)
            u_t = us[k].to(tl.float32)
            b_t, c_t = _b_and_c(bcs[k], NP, h.shape[1])
            fade = tl.exp2(_decay(dt, idle_e, gap, s, length, BACK, GAP)[None, :] * a2)
            h = fade * h + (dt * u_t)[None, :] * b_t[:, None]
            y_t = d_e * u_t + tl.sum(h * c_t[:, None], 0)
            at = sums + t * tl.num_programs(0) + tl.program_id(0)
            for i in tl.static_range(len(terms)):
                tl.store(at + i * step_k, tl.sum(terms[i](dt, u_t, y_t, maximum), 0))
            if not FIRST:
                y_t += ys[k].to(tl.float32)
            if LAST and ungated is not None:
                tl.store(ungated + t * channels + e, y_t.to(ungated.dtype.element_ty), inside)
            if LAST and GATE:
                z_t = zs[k].to(tl.float32)
                y_t *= scale * z_t / (1 + tl.exp2(-z_t * LOG2E))
            elif LAST:
                y_t *= scale
            into = y_at + SIGN * k * channels if order is None else y + t * channels + e
            if EVEN:
                tl.store(into, y_t.to(y.dtype.element_ty))
            else:
                tl.store(into, y_t.to(y.dtype.element_ty), inside)
    return h


@triton.jit
def _direction(h, u, delta, bc, z, order, gap, stretch, y, sums, terms, kept, ungated, e, inside, start, end, length,
               a2, d_e, bias_e, idle_e, channels: tl.constexpr, step_z: tl.constexpr, step_t: tl.constexpr, step_k,
               scale, BACK: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, GATE: tl.constexpr,
               SOFTPLUS: tl.constexpr, GAP: tl.constexpr, STRETCH: tl.constexpr, EVEN: tl.constexpr, NP: tl.constexpr,
               U: tl.constexpr):  # fmt: skip
    """Scan the tokens from ``start`` to ``end``, those of ``order`` if there is one, from the state h."""
    whole = (end - start) // U * U
    if whole > 0:
        h = _walk(h, u, delta, bc, z, order, gap, stretch, y, sums, terms, kept, ungated, e, inside,
                  end - 1 if BACK else start, whole, length, a2, d_e, bias_e, idle_e, channels, step_z,
                  step_t, step_k, scale, BACK, FIRST, LAST, GATE, SOFTPLUS, GAP, STRETCH, EVEN, NP, U)  # fmt: skip
    if whole < end - start:
        h = _walk(h, u, delta, bc, z, order, gap, stretch, y, sums, terms, kept, ungated, e, inside,
                  end - 1 - whole if BACK else start + whole, end - start - whole, length, a2, d_e, bias_e, idle_e,
                  channels, step_z, step_t, step_k, scale, BACK, FIRST, LAST, GATE, SOFTPLUS, GAP, STRETCH, EVEN, NP,
                  1)  # fmt: skip
    return h


@triton.jit(do_not_specialize=["length", "chunk"])
def _scan(u, delta, a, bc, d, bias, z, order, gap, stretch, y, sums, terms, before, faded, kept, ungated,
          length, channels: tl.constexpr, chunk, step_z: tl.constexpr, step_g, step_b, step_t: tl.constexpr, scale,
          REVERSE: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, G: tl.constexpr, GATE: tl.constexpr,
          SOFTPLUS: tl.constexpr, GAP: tl.constexpr, STRETCH: tl.constexpr, SPLIT: tl.constexpr, NP: tl.constexpr,
          CH: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """Directions ``FROM`` to ``TO`` of G."""
    e = tl.program_id(0) * CH + tl.arange(0, CH)
    image, images = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    inside = e < channels
    start = tl.program_id(2) * chunk
    end = tl.minimum(start + chunk, length)
    for g in tl.static_range(FROM, TO):
        each = g * images + image
        a2, d_e, bias_e, idle_e = _constants(a + g * channels * NP, d + g * channels, bias + g * channels, e, inside,
                                             channels, SOFTPLUS, GAP, NP, CH)  # fmt: skip
        h = tl.zeros((NP, CH), tl.float32)
        if SPLIT:  # the state that the chunks before this one leave behind
            chunks = tl.num_programs(2)
            passed = chunks - 1 - tl.program_id(2) if (REVERSE >> g) & 1 else tl.program_id(2)
            for j in tl.range(0, passed, num_stages=STAGES):
                other = each * chunks + (chunks - 1 - j if (REVERSE >> g) & 1 else j)
                sum_e = tl.load(faded + other * channels + e, inside, 0)
                left = tl.load(_tile(before + other * NP * channels, e, channels, NP, CH), inside[None, :], 0)
                h = tl.exp2(sum_e[None, :] * a2) * h + left
        _direction(h, u + each * length * channels, delta + each * length * channels,
                   bc + g * step_g + image * step_b, z + image * length * step_z,
                   None if order is None else order + each * length, gap + (image * G + g) * length,
                   stretch + image * length, y + image * length * channels,
                   sums + each * length * tl.num_programs(0), terms,
                   None if kept is None else kept + each * ((length - 1) // KEPT) * NP * channels,
                   None if ungated is None else ungated + image * length * channels, e, inside, start, end, length,
                   a2, d_e, bias_e, idle_e, channels, step_z, step_t,
                   G * images.to(tl.int64) * length * tl.num_programs(0), scale, (REVERSE >> g) & 1, g == 0, g == G - 1,
                   GATE, SOFTPLUS, GAP, STRETCH, channels % CH == 0, NP, U)  # fmt: skip
        tl.debug_barrier()  # the next direction adds to what this one stored


@triton.jit(do_not_specialize=["length", "middle"])
def _scan_half(u, delta, a, bc, d, bias, z, gap, stretch, y, sums, terms, states,
               length, channels: tl.constexpr, middle, step_z: tl.constexpr, step_g, step_b, step_t: tl.constexpr,
               scale, REVERSE: tl.constexpr, FIRST: tl.constexpr, GATE: tl.constexpr, SOFTPLUS: tl.constexpr,
               GAP: tl.constexpr, STRETCH: tl.constexpr, NP: tl.constexpr, CH: tl.constexpr,
               U: tl.constexpr):  # fmt: skip
    """Two opposite directions, a program each, to the middle, or from there to where the other one came from. What the
    second half adds to is complete since the first was a launch of its own."""
    e = tl.program_id(0) * CH + tl.arange(0, CH)
    image, images = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    inside = e < channels
    for g in tl.static_range(2):
        if tl.program_id(2) == g:
            each = g * images + image
            a2, d_e, bias_e, idle_e = _constants(a + g * channels * NP, d + g * channels, bias + g * channels, e,
                                                  inside, channels, SOFTPLUS, GAP, NP, CH)  # fmt: skip
            state = _tile(states + each * NP * channels, e, channels, NP, CH)
            BACK: tl.constexpr = (REVERSE >> g) & 1
            h = tl.zeros((NP, CH), tl.float32) if FIRST else tl.load(state, inside[None, :], 0)
            if BACK == FIRST:
                start, end = middle, length
            else:
                start, end = 0, middle
            h = _direction(h, u + each * length * channels, delta + each * length * channels,
                           bc + g * step_g + image * step_b, z + image * length * step_z, None,
                           gap + (image * 2 + g) * length, stretch + image * length, y + image * length * channels,
                           sums + each * length * tl.num_programs(0), terms, None, None, e, inside, start, end, length,
                           a2, d_e, bias_e, idle_e, channels, step_z, step_t,
                           2 * images.to(tl.int64) * length * tl.num_programs(0), scale, BACK, FIRST, not FIRST, GATE,
                           SOFTPLUS, GAP, STRETCH, channels % CH == 0, NP, U)  # fmt: skip
            if FIRST:
                tl.store(state, h, inside[None, :])


@triton.jit
def _left(h, total, u, delta, bc, order, gap, stretch, e, inside, first, count, length, a2, bias_e, idle_e,
          channels: tl.constexpr, step_t: tl.constexpr, BACK: tl.constexpr, SOFTPLUS: tl.constexpr, GAP: tl.constexpr,
          STRETCH: tl.constexpr, EVEN: tl.constexpr, NP: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """``_walk`` without an output: the state after ``count`` tokens, and the sum of Δ and the gaps crossed."""
    SIGN: tl.constexpr = -1 if BACK else 1
    for i in tl.range(0, count, U, num_stages=STAGES):
        s0 = first + SIGN * i
        us = _tokens(u, s0, order, e, inside, channels, SIGN, EVEN, U)
        dts = _tokens(delta, s0, order, e, inside, channels, SIGN, EVEN, U)
        bcs = _states(bc, s0, order, step_t, SIGN, NP, U)
        for k in tl.static_range(U):
            s = s0 + SIGN * k
            t = s if order is None else tl.load(order + s)
            dt = _timescale(dts[k], inside, bias_e, stretch, t, SOFTPLUS, STRETCH)
            write = dt * us[k].to(tl.float32)
            dt = _decay(dt, idle_e, gap, s, length, BACK, GAP)
            b_t, _ = _b_and_c(bcs[k], NP, h.shape[1])
            h = tl.exp2(dt[None, :] * a2) * h + write[None, :] * b_t[:, None]
            total += dt
    return h, total


@triton.jit(do_not_specialize=["length", "chunk"])
def _chunk_states(u, delta, a, bc, d, bias, order, gap, stretch, before, faded,
                  images, length, channels: tl.constexpr, chunk, step_g, step_b, step_t: tl.constexpr,
                  REVERSE: tl.constexpr, G: tl.constexpr, SOFTPLUS: tl.constexpr, GAP: tl.constexpr,
                  STRETCH: tl.constexpr, NP: tl.constexpr, CH: tl.constexpr, U: tl.constexpr):  # fmt: skip
    EVEN: tl.constexpr = channels % CH == 0
    e = tl.program_id(0) * CH + tl.arange(0, CH)
    inside = e < channels
    each = tl.program_id(1).to(tl.int64)
    image = each % images
    start = tl.program_id(2) * chunk
    count = tl.minimum(chunk, length - start)
    whole = count // U * U
    at = each * tl.num_programs(2) + tl.program_id(2)
    u += each * length * channels
    delta += each * length * channels
    gap += (image * G + each // images) * length
    stretch += image * length
    if order is not None:
        order += each * length
    for g in tl.static_range(G):
        if each // images == g:
            a2, _, bias_e, idle_e = _constants(a + g * channels * NP, d + g * channels, bias + g * channels, e,
                                                  inside, channels, SOFTPLUS, GAP, NP, CH)  # fmt: skip
            h = tl.zeros((NP, CH), tl.float32)
            total = tl.zeros((CH,), tl.float32)
            bc_g = bc + g * step_g + image * step_b
            first = start + count - 1 if (REVERSE >> g) & 1 else start
            h, total = _left(h, total, u, delta, bc_g, order, gap, stretch, e, inside, first, whole, length, a2,
                             bias_e, idle_e, channels, step_t, (REVERSE >> g) & 1, SOFTPLUS, GAP, STRETCH, EVEN, NP,
                             U)  # fmt: skip
            first = first - whole if (REVERSE >> g) & 1 else first + whole
            h, total = _left(h, total, u, delta, bc_g, order, gap, stretch, e, inside, first, count - whole, length,
                             a2, bias_e, idle_e, channels, step_t, (REVERSE >> g) & 1, SOFTPLUS, GAP, STRETCH, EVEN, NP,
                             1)  # fmt: skip
            tl.store(faded + at * channels + e, total, inside)
            tl.store(_tile(before + at * NP * channels, e, channels, NP, CH), h, inside[None, :])


@on_its_device
def selective_scan(inputs: ScanInputs, stats: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The contract of ``mtr_lab.ops.selective_scan_reference``, on a GPU."""
    u, delta, A, B, C, D, z, delta_bias, order, gap, stretch, reverse = inputs
    if delta_bias is None:
        delta_bias = torch.zeros_like(D)
    more = triton.next_power_of_2(A.shape[2]) - A.shape[2]  # states that stay zero
    return scan(
        u.contiguous(), delta.contiguous(), F.pad(A.float().transpose(1, 2), (0, 0, 0, more)).contiguous(),
        torch.cat([F.pad(B, (0, more)), F.pad(C, (0, more))], dim=3), D.float().contiguous(), z,
        delta_bias.float().contiguous(), order, gap, stretch, reverse, stats, softplus=True,
    )  # fmt: skip


@on_its_device
def scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    bc: Tensor,
    d: Tensor,
    z: Tensor | None,
    bias: Tensor,
    order: Tensor | None,
    gap: Tensor | None,
    stretch: Tensor | None,
    reverse: Sequence[int],
    stats: Sequence[str],
    *,
    softplus: bool,
    scale: float = 1.0,
    kept: Tensor | None = None,
    ungated: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``selective_scan`` with its constants laid out for the kernel.

    Args:
        u: (G, B, L, E), contiguous; ``delta`` likewise, of any dtype.
        a: (G, N, E) float32, contiguous, N a power of two; ``d`` and ``bias`` (G, E) likewise.
        bc: B and C side by side, (G, B, L, 2N), the last stride 1.
        z: (B, L, E), the last stride 1 and rows evenly spaced; ``None`` for no gate.
        softplus: whether ``delta`` still lacks bias and softplus; without, ``bias`` is read for gaps alone.
        scale: the result is multiplied by it.
        kept, ungated: to be filled for a backward pass, both or none: the states before every ``KEPT``-th token of a
            direction but the first, (G, B, (L - 1) // KEPT, N, E), and the directions' sum before the gate,
            (B, L, E). Sequences are scanned whole then.

    The directions' sum is kept in y, so that of two directions in half precision the first is rounded before the gate.

    Returns:
        y (B, L, E), and the statistics (G, B, L, len(stats)) in float32.
    """
    directions, images, length, channels = u.shape
    y = torch.empty_like(u[0])
    absent = y  # stands for a tensor the kernel does not read
    z_rows = absent if z is None else rows(z)
    order = None if order is None else order.contiguous()
    gaps, stretches = (absent if t is None else t.contiguous() for t in (gap, stretch))
    mask = reverse_mask(reverse)
    opposite = directions == 2 and mask in (1, 2)
    halves = half_width(images, channels, u.device) if opposite and kept is None else 0
    width = halves or CHANNELS
    blocks = triton.cdiv(channels, width)
    sums = u.new_empty(len(stats), directions, images, length, blocks, dtype=torch.float32)
    data = u, delta, a, bc, d, bias, z_rows
    rest = gaps, stretches, y, sums, terms(stats)
    strides = z_rows.stride(1), *bc.stride()[:3]
    options = {
        "REVERSE": mask, "GATE": z is not None, "SOFTPLUS": softplus, "GAP": gap is not None,
        "STRETCH": stretch is not None, "NP": a.shape[1], "CH": width, "num_warps": 1, **REGISTERS,
    }  # fmt: skip
    if halves:
        states = u.new_empty(directions, images, a.shape[1], channels, dtype=torch.float32)
        middle = length // (2 * UNROLL_HALF) * UNROLL_HALF
        for first in (True, False):
            _scan_half[blocks, images, directions](
                *data, *rest, states, length, channels, middle, *strides, scale, FIRST=first, U=UNROLL_HALF, **options
            )
    else:
        chunk = chunk_length(length, images * blocks, u.device) if kept is None else length
        chunks = triton.cdiv(length, chunk)
        before = faded = absent
        if chunks > 1:
            before, faded = chunk_states(
                u, delta, a, bc, d, bias, order, gap, stretch, reverse, chunk, softplus=softplus
            )
        # With an order, a token is in another chunk of every direction: a launch a direction, for what it adds to.
        launches = [(g, g + 1) for g in range(directions)] if order is not None and chunks > 1 else [(0, directions)]
        for first, last in launches:
            _scan[blocks, images, chunks](
                *data, order, *rest, before, faded, kept, ungated, length, channels, chunk, *strides, scale, FROM=first,
                TO=last, G=directions, SPLIT=chunks > 1, U=UNROLL, **options,
            )  # fmt: skip
    if not stats:
        return y, sums.view(directions, images, length, 0)
    return y, sums.sum(-1).movedim(0, -1).contiguous()


def chunk_states(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    bc: Tensor,
    d: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    gap: Tensor | None,
    stretch: Tensor | None,
    reverse: Sequence[int],
    chunk: int,
    *,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """What every chunk of tokens leaves behind, were the state zero before it; arguments as in ``scan``.

    Returns:
        The states (G, B, chunks, N, E), and the sums over the chunk of Δ and the gaps crossed, (G, B, chunks, E).
    """
    directions, images, length, channels = u.shape
    grid = triton.cdiv(channels, CHANNELS), directions * images, triton.cdiv(length, chunk)
    before = u.new_empty(directions, images, grid[2], a.shape[1], channels, dtype=torch.float32)
    faded = u.new_empty(directions, images, grid[2], channels, dtype=torch.float32)
    absent = u  # stands for a tensor the kernel does not read
    gaps, stretches = (absent if t is None else t.contiguous() for t in (gap, stretch))
    _chunk_states[grid](
        u, delta, a, bc, d, torch.zeros_like(d) if bias is None else bias,
        None if order is None else order.contiguous(), gaps, stretches, before, faded, images, length, channels,
        chunk, *bc.stride()[:3],
        REVERSE=reverse_mask(reverse), G=directions, SOFTPLUS=softplus, GAP=gap is not None,
        STRETCH=stretch is not None, NP=a.shape[1], CH=CHANNELS, U=UNROLL, num_warps=1,
    )  # fmt: skip
    return before, faded


def half_width(images: int, channels: int, device: torch.device) -> int:
    """How many channels a program of ``_scan_half`` is to have; 0 where another form is faster.

    The limits are those measured on an H100 at 197 tokens; at 4 097, chunks are faster up to 1.4 walks.
    """
    walks = 2 * images * channels / 32 / processors(device)  # of 32 channels in one direction, on a multiprocessor
    if walks < 1 or walks >= 40:
        return 0
    return 16 if walks < 8 else 32


def chunk_length(length: int, warps: int, device: torch.device) -> int:
    """How many tokens a program walks through: fewer than all where one walk a channel would leave the GPU idle.

    Those are whole groups of ``UNROLL``.
    """
    room = fill(device) // max(warps, 1)
    wanted = min(room, CHUNKS, length // MIN_CHUNK)
    return length if room < LEAST_ROOM or wanted < 2 else UNROLL * triton.cdiv(length, wanted * UNROLL)
