"""The selective scan as Triton kernels: every direction of a block, skip, gate and their sum in one launch.

A program, one warp, owns one image, some channels and a chunk of tokens, and walks through the chunk once for each
direction. Each thread holds two channels and all their states: the sum over states needs no exchange between threads,
and what is read of B and C serves both channels. What bounds the kernel are the exponentials, one for each token,
channel, state and direction, of which a multiprocessor computes 16 a clock.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.launch import aligned_rows, autotuned, fill, reverse_mask, rows

LOG2E = tl.constexpr(1.4426950408889634)
CHANNELS = 64  # of a program, which is one warp
UNROLL = 4  # tokens whose loads are under way together
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


@triton.jit
def _timescale(delta_t, there, bias_e, stretch, t, SOFTPLUS: tl.constexpr, STRETCH: tl.constexpr):
    dt = delta_t.to(tl.float32)
    if SOFTPLUS:
        dt = tl.where(there, softplus(dt + bias_e), 0)
    if STRETCH:
        dt *= tl.load(stretch + t, mask=t >= 0, other=0)
    return dt


@triton.jit
def _decay(dt, idle_e, gap, t, length, BACK: tl.constexpr, GAP: tl.constexpr):
    if GAP:  # a backward scan crosses the gap in front of token t + 1 when it arrives at token t
        crossed = t + 1 if BACK else t
        dt += tl.load(gap + crossed, mask=(crossed >= 0) & (crossed < length), other=0).to(tl.float32) * idle_e
    return dt


@triton.jit
def _tile(x, n, e, channels: tl.constexpr):
    """Pointers to all states of the channels. A thread is to hold whole channels, two beside each other, so that the
    sum over states needs no other thread; the compiler decides so if it may load two numbers at a time, not four."""
    return tl.multiple_of(x + n[:, None] * channels + e[None, :], (8, 8))


@triton.jit
def _constants(a, d, bias, e, inside, channels: tl.constexpr, SOFTPLUS: tl.constexpr, GAP: tl.constexpr,
               N: tl.constexpr, NP: tl.constexpr):  # fmt: skip
    n = tl.arange(0, NP)
    a2 = tl.load(_tile(a, n, e, channels), inside[None, :] & (n < N)[:, None], 0)
    d_e = tl.load(d + e, inside, 0)
    bias_e, idle_e = d_e, d_e
    if SOFTPLUS:
        bias_e = tl.load(bias + e, inside, 0)
    if GAP:
        idle_e = softplus(tl.load(bias + e, inside, 0))
    return a2 * LOG2E, d_e, bias_e, idle_e


@triton.jit
def _rows(x, U: tl.constexpr, step: tl.constexpr, inside, EVEN: tl.constexpr):
    """U rows of channels, ``step`` elements apart. Strides are constants, so that one address serves all of them."""
    loaded = ()
    for k in tl.static_range(U):
        loaded = loaded + (tl.load(x + k * step) if EVEN else tl.load(x + k * step, inside, 0),)
    return loaded


@triton.jit
def _states_row(x, n, N: tl.constexpr, NP: tl.constexpr):
    row = tl.load(x + n) if N == NP else tl.load(x + n, n < N, 0)
    return row.to(tl.float32)


@triton.jit
def _walk(h, u, delta, b, c, z, gap, stretch, y, sums, e, inside, first, count, length, a2, d_e, bias_e, idle_e,
          channels: tl.constexpr, step_z: tl.constexpr, step_t: tl.constexpr, step_k, scale,
          BACK: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, GATE: tl.constexpr, SOFTPLUS: tl.constexpr,
          GAP: tl.constexpr, STRETCH: tl.constexpr, SUMS: tl.constexpr, OUTPUT: tl.constexpr, EVEN: tl.constexpr,
          N: tl.constexpr, NP: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """Scan ``count`` tokens from ``first`` on, U at a time, which divides their number."""
    n = tl.arange(0, NP)
    SIGN: tl.constexpr = -1 if BACK else 1
    # B and C of the next tokens are read once, in one instruction, for no other reason than that the cache has them
    # when all their broadcast reads come. The sum keeps the compiler from leaving that out.
    ahead = tl.arange(0, U)[:, None] * (SIGN * step_t) + n[None, :]
    known = n[None, :] < N
    b_ahead, c_ahead = tl.load(b + first * step_t + ahead, known, 0), tl.load(c + first * step_t + ahead, known, 0)
    unused = tl.zeros((U, NP), tl.float32)
    for i in range(0, count, U):
        t0 = first + SIGN * i
        unused += b_ahead.to(tl.float32) + c_ahead.to(tl.float32)
        t1 = first + SIGN * tl.minimum(i + U, count - U)
        b_ahead, c_ahead = tl.load(b + t1 * step_t + ahead, known, 0), tl.load(c + t1 * step_t + ahead, known, 0)
        us = _rows(u + t0 * channels + e, U, SIGN * channels, inside, EVEN)
        dts = _rows(delta + t0 * channels + e, U, SIGN * channels, inside, EVEN)
        ys, zs = us, us
        if not FIRST:
            ys = _rows(y + t0 * channels + e, U, SIGN * channels, inside, EVEN)
        if LAST and GATE:
            zs = _rows(z + t0 * step_z + e, U, SIGN * step_z, inside, EVEN)
        tl.debug_barrier()  # all loads are under way before the first is waited for: the compiler would delay them
        b_at, c_at, y_at = b + t0 * step_t, c + t0 * step_t, y + t0 * channels + e
        for k in tl.static_range(U):
            t = t0 + SIGN * k
            dt = _timescale(dts[k], inside, bias_e, stretch, t, SOFTPLUS, STRETCH)
            u_t = us[k].to(tl.float32)
            b_t, c_t = _states_row(b_at + SIGN * k * step_t, n, N, NP), _states_row(c_at + SIGN * k * step_t, n, N, NP)
            fade = tl.exp2(_decay(dt, idle_e, gap, t, length, BACK, GAP)[None, :] * a2)
            h = fade * h + (dt * u_t)[None, :] * b_t[:, None]
            y_t = d_e * u_t + tl.sum(h * c_t[:, None], 0)
            at = sums + t * tl.num_programs(0) + tl.program_id(0)
            if SUMS:
                tl.store(at, tl.sum(dt, 0))
                tl.store(at + step_k, tl.sum(dt * dt * u_t * u_t, 0))
            if OUTPUT:
                tl.store(at + 2 * step_k, tl.sum(tl.maximum(y_t, 0), 0))
            if not FIRST:
                y_t += ys[k].to(tl.float32)
            if LAST and GATE:
                z_t = zs[k].to(tl.float32)
                y_t *= scale * z_t / (1 + tl.exp2(-z_t * LOG2E))
            elif LAST:
                y_t *= scale
            if EVEN:
                tl.store(y_at + SIGN * k * channels, y_t.to(y.dtype.element_ty))
            else:
                tl.store(y_at + SIGN * k * channels, y_t.to(y.dtype.element_ty), inside)
    tl.store(sums + ahead, unused + b_ahead.to(tl.float32) + c_ahead.to(tl.float32), (length < 0) & known)
    return h


@triton.jit
def _direction(u, delta, a, b, c, d, bias, z, gap, stretch, y, sums, before, faded, e, inside, start, end, length,
               channels: tl.constexpr, step_z: tl.constexpr, step_t: tl.constexpr, step_k, scale,
               BACK: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, GATE: tl.constexpr, SOFTPLUS: tl.constexpr,
               GAP: tl.constexpr, STRETCH: tl.constexpr, SUMS: tl.constexpr, OUTPUT: tl.constexpr, SPLIT: tl.constexpr,
               EVEN: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, CH: tl.constexpr, U: tl.constexpr):  # fmt: skip
    n = tl.arange(0, NP)
    a2, d_e, bias_e, idle_e = _constants(a, d, bias, e, inside, channels, SOFTPLUS, GAP, N, NP)
    h = tl.zeros((NP, CH), tl.float32)
    if SPLIT:  # the state that the chunks before this one leave behind
        chunks = tl.num_programs(2)
        for j in range(chunks - 1 - tl.program_id(2) if BACK else tl.program_id(2)):
            other = chunks - 1 - j if BACK else j
            sum_e = tl.load(faded + other * channels + e, inside, 0)
            left = tl.load(_tile(before + other * NP * channels, n, e, channels), inside[None, :], 0)
            h = tl.exp2(sum_e[None, :] * a2) * h + left
    whole = (end - start) // U * U
    if whole > 0:
        h = _walk(h, u, delta, b, c, z, gap, stretch, y, sums, e, inside, end - 1 if BACK else start, whole, length,
                  a2, d_e, bias_e, idle_e, channels, step_z, step_t, step_k, scale, BACK, FIRST, LAST, GATE, SOFTPLUS,
                  GAP, STRETCH, SUMS, OUTPUT, EVEN, N, NP, U)  # fmt: skip
    if whole < end - start:
        _walk(h, u, delta, b, c, z, gap, stretch, y, sums, e, inside, end - 1 - whole if BACK else start + whole,
              end - start - whole, length, a2, d_e, bias_e, idle_e, channels, step_z, step_t, step_k, scale, BACK,
              FIRST, LAST, GATE, SOFTPLUS, GAP, STRETCH, SUMS, OUTPUT, EVEN, N, NP, 1)  # fmt: skip


def _configurations() -> list[triton.Config]:
    """Fewer registers a thread, more warps beside each other; which is better depends on how many there are to run."""
    limits = (168, 128) if torch.version.hip is None else (None,)  # an option of NVIDIA's compiler
    return [triton.Config({}, num_warps=1, maxnreg=limit) for limit in limits]


@autotuned(_configurations(), key=["channels", "N", "G", "SPLIT"])
@triton.jit(do_not_specialize=["length", "chunk"])
def _scan(u, delta, a, b, c, d, bias, z, gap, stretch, y, sums, before, faded,
          length, channels: tl.constexpr, chunk, step_z: tl.constexpr, step_g, step_b, step_t: tl.constexpr, scale,
          REVERSE: tl.constexpr, G: tl.constexpr, GATE: tl.constexpr, SOFTPLUS: tl.constexpr, GAP: tl.constexpr,
          STRETCH: tl.constexpr, SUMS: tl.constexpr, OUTPUT: tl.constexpr, SPLIT: tl.constexpr, N: tl.constexpr,
          NP: tl.constexpr, CH: tl.constexpr, U: tl.constexpr):  # fmt: skip
    e = tl.program_id(0) * CH + tl.arange(0, CH)
    image, images = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    inside = e < channels
    start = tl.program_id(2) * chunk
    end = tl.minimum(start + chunk, length)
    for g in tl.static_range(G):
        each = g * images + image
        at = g * step_g + image * step_b
        state = each * tl.num_programs(2) * channels
        _direction(u + each * length * channels, delta + each * length * channels, a + g * channels * N, b + at, c + at,
                   d + g * channels, bias + g * channels, z + image * length * step_z, gap + image * length,
                   stretch + image * length, y + image * length * channels, sums + each * length * tl.num_programs(0),
                   before + state * NP, faded + state, e, inside, start, end, length, channels, step_z, step_t,
                   G * images * length * tl.num_programs(0), scale,
                   (REVERSE >> g) & 1, g == 0, g == G - 1, GATE, SOFTPLUS, GAP, STRETCH, SUMS, OUTPUT, SPLIT,
                   channels % CH == 0, N, NP, CH, U)  # fmt: skip
        tl.debug_barrier()  # the next direction adds to what this one stored


@triton.jit
def _left(h, total, u, delta, b, gap, stretch, e, inside, first, count, length, a2, bias_e, idle_e,
          channels: tl.constexpr, step_t: tl.constexpr, BACK: tl.constexpr, SOFTPLUS: tl.constexpr, GAP: tl.constexpr,
          STRETCH: tl.constexpr, EVEN: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """``_walk`` without an output: the state after ``count`` tokens, and the sum of Δ and the gaps crossed."""
    n = tl.arange(0, NP)
    SIGN: tl.constexpr = -1 if BACK else 1
    for i in range(0, count, U):
        t0 = first + SIGN * i
        us = _rows(u + t0 * channels + e, U, SIGN * channels, inside, EVEN)
        dts = _rows(delta + t0 * channels + e, U, SIGN * channels, inside, EVEN)
        tl.debug_barrier()
        for k in tl.static_range(U):
            t = t0 + SIGN * k
            dt = _timescale(dts[k], inside, bias_e, stretch, t, SOFTPLUS, STRETCH)
            write = dt * us[k].to(tl.float32)
            dt = _decay(dt, idle_e, gap, t, length, BACK, GAP)
            b_t = _states_row(b + t0 * step_t + SIGN * k * step_t, n, N, NP)
            h = tl.exp2(dt[None, :] * a2) * h + write[None, :] * b_t[:, None]
            total += dt
    return h, total


@triton.jit(do_not_specialize=["length", "chunk"])
def _chunk_states(u, delta, a, b, d, bias, gap, stretch, before, faded,
                  images, length, channels: tl.constexpr, chunk, step_g, step_b, step_t: tl.constexpr,
                  REVERSE: tl.constexpr, G: tl.constexpr, SOFTPLUS: tl.constexpr, GAP: tl.constexpr,
                  STRETCH: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, CH: tl.constexpr,
                  U: tl.constexpr):  # fmt: skip
    EVEN: tl.constexpr = channels % CH == 0
    e = tl.program_id(0) * CH + tl.arange(0, CH)
    inside = e < channels
    each = tl.program_id(1).to(tl.int64)
    image = each % images
    n = tl.arange(0, NP)
    start = tl.program_id(2) * chunk
    count = tl.minimum(chunk, length - start)
    whole = count // U * U
    at = each * tl.num_programs(2) + tl.program_id(2)
    u += each * length * channels
    delta += each * length * channels
    gap += image * length
    stretch += image * length
    for g in tl.static_range(G):
        if each // images == g:
            a2, _, bias_e, idle_e = _constants(a + g * channels * N, d + g * channels, bias + g * channels, e, inside,
                                               channels, SOFTPLUS, GAP, N, NP)  # fmt: skip
            h = tl.zeros((NP, CH), tl.float32)
            total = tl.zeros((CH,), tl.float32)
            b_g = b + g * step_g + image * step_b
            first = start + count - 1 if (REVERSE >> g) & 1 else start
            h, total = _left(h, total, u, delta, b_g, gap, stretch, e, inside, first, whole, length, a2, bias_e, idle_e,
                             channels, step_t, (REVERSE >> g) & 1, SOFTPLUS, GAP, STRETCH, EVEN, N, NP, U)  # fmt: skip
            first = first - whole if (REVERSE >> g) & 1 else first + whole
            h, total = _left(h, total, u, delta, b_g, gap, stretch, e, inside, first, count - whole, length, a2, bias_e,
                             idle_e, channels, step_t, (REVERSE >> g) & 1, SOFTPLUS, GAP, STRETCH, EVEN, N, NP,
                             1)  # fmt: skip
            tl.store(faded + at * channels + e, total, inside)
            tl.store(_tile(before + at * NP * channels, n, e, channels), h, inside[None, :])


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
    gap: Tensor | None,
    stretch: Tensor | None,
    reverse: Sequence[bool],
    with_stats: bool,
) -> tuple[Tensor, Tensor]:
    """The contract of ``mtr_lab.ops.selective_scan_reference``, on a GPU."""
    if delta_bias is None:
        delta_bias = torch.zeros_like(D)
    a = A.float().transpose(1, 2).contiguous()  # (G, N, E)
    return scan(
        u.contiguous(), delta.contiguous(), a, B, C, D.float().contiguous(), z, delta_bias.float().contiguous(),
        gap, stretch, reverse, softplus=True, sums=with_stats, output=with_stats,
    )  # fmt: skip


def scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    z: Tensor | None,
    bias: Tensor,
    gap: Tensor | None,
    stretch: Tensor | None,
    reverse: Sequence[bool],
    *,
    softplus: bool,
    sums: bool,
    output: bool,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``selective_scan`` with its constants laid out for the kernel.

    Args:
        u: (G, B, L, E), contiguous; ``delta`` likewise, of any dtype.
        a: (G, N, E) float32, contiguous; ``d`` and ``bias`` (G, E) likewise.
        b, c: (G, B, L, N), the last stride 1, the others equal in both.
        z: (B, L, E), the last stride 1 and rows evenly spaced; ``None`` for no gate.
        softplus: whether ``delta`` still lacks bias and softplus; without, ``bias`` is read for gaps alone.
        sums, output: whether to emit Σ Δ and Σ (Δ u)², and Σ max(0, y).
        scale: the result is multiplied by it.

    The directions' sum is kept in y, so that of two directions in half precision the first is rounded before the gate.

    Returns:
        y (B, L, E), and the sums (G, B, L, 3) in float32, where those not asked for are undefined; without any,
        (G, B, L, 0).
    """
    directions, images, length, channels = u.shape
    states, padded, blocks = a.shape[1], triton.next_power_of_2(a.shape[1]), triton.cdiv(channels, CHANNELS)
    b, c = aligned_rows(b, c)
    y = torch.empty_like(u[0])
    absent = y  # stands for a tensor the kernel does not read
    z_rows = absent if z is None else rows(z)
    gaps, stretches = (absent if t is None else t.contiguous() for t in (gap, stretch))
    mask = reverse_mask(reverse)
    chunk = chunk_length(length, images * blocks, u.device)
    chunks = triton.cdiv(length, chunk)
    switches: dict[str, int] = {"SOFTPLUS": softplus, "GAP": gap is not None, "STRETCH": stretch is not None}
    switches |= {"REVERSE": mask, "G": directions, "N": states, "NP": padded, "CH": CHANNELS, "U": UNROLL}
    before = faded = absent
    if chunks > 1:
        before = u.new_empty(directions, images, chunks, padded, channels, dtype=torch.float32)
        faded = u.new_empty(directions, images, chunks, channels, dtype=torch.float32)
        _chunk_states[blocks, directions * images, chunks](
            u, delta, a, b, d, bias, gaps, stretches, before, faded, images, length, channels, chunk,
            *b.stride()[:3], **switches, num_warps=1,
        )  # fmt: skip
    size = 3 * directions * images * length * blocks if sums or output else 1
    parts = u.new_empty(size, dtype=torch.float32)
    _scan[blocks, images, chunks](
        u, delta, a, b, c, d, bias, z_rows, gaps, stretches, y, parts, before, faded,
        length, channels, chunk, z_rows.stride(1), *b.stride()[:3], scale,
        GATE=z is not None, **switches, SUMS=sums, OUTPUT=output, SPLIT=chunks > 1,
    )  # fmt: skip
    if not (sums or output):
        return y, parts.new_empty(directions, images, length, 0)
    return y, parts.view(3, directions, images, length, blocks).sum(-1).movedim(0, -1).contiguous()


def chunk_length(length: int, warps: int, device: torch.device) -> int:
    """How many tokens a program walks through: fewer than all where one walk a channel would leave the GPU idle."""
    wanted = min(fill(device) // max(warps, 1), CHUNKS, length // MIN_CHUNK)
    return triton.cdiv(length, max(wanted, 1))
