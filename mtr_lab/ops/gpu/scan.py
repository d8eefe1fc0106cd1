"""The selective scan as Triton kernels: every direction of a block, skip, gate and their sum in one launch.

A program owns one image, a block of channels and a chunk of tokens, and walks through the chunk once for each
direction. Each thread holds one channel and all its states: the sum over states needs no exchange between threads and
a row of channels-last data is one coalesced access. What is to bound the kernel are the exponentials, one for each
token, channel, state and direction, of which a multiprocessor computes 16 a clock; the instructions beside them take
fewer issue slots.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.launch import aligned_rows, autotuned, fill, reverse_mask, rows

LOG2E = tl.constexpr(1.4426950408889634)
CHUNKS = 16  # of a sequence that is split, at most: each program sums up the ones before its own
MIN_CHUNK = 16  # tokens: below, the second pass over them costs more than it hides


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
def _constants(a, d, bias, e, inside, channels, SOFTPLUS: tl.constexpr, GAP: tl.constexpr, N: tl.constexpr,
               NP: tl.constexpr):  # fmt: skip
    n = tl.arange(0, NP)
    # The stated alignment keeps the compiler from loading four channels a thread, which would decide the layout of
    # the states: a thread is to hold one channel.
    a2 = tl.load(tl.multiple_of(a + n[:, None] * channels + e[None, :], (4, 4)), inside[None, :] & (n < N)[:, None], 0)
    d_e = tl.load(d + e, inside, 0)
    bias_e, idle_e = d_e, d_e
    if SOFTPLUS:
        bias_e = tl.load(bias + e, inside, 0)
    if GAP:
        idle_e = softplus(tl.load(bias + e, inside, 0))
    return a2 * LOG2E, d_e, bias_e, idle_e


@triton.jit
def _direction(u, delta, a, b, c, d, bias, z, gap, stretch, y, sums, before, faded,
               e, inside, start, end, length, channels, step_z, step_t, step_k, scale,
               BACK: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, GATE: tl.constexpr, SOFTPLUS: tl.constexpr,
               GAP: tl.constexpr, STRETCH: tl.constexpr, SUMS: tl.constexpr, OUTPUT: tl.constexpr, SPLIT: tl.constexpr,
               N: tl.constexpr, NP: tl.constexpr, CH: tl.constexpr, U: tl.constexpr):  # fmt: skip
    n = tl.arange(0, NP)
    a2, d_e, bias_e, idle_e = _constants(a, d, bias, e, inside, channels, SOFTPLUS, GAP, N, NP)
    h = tl.zeros((NP, CH), tl.float32)
    if SPLIT:  # the state that the chunks before this one leave behind
        chunks = tl.num_programs(2)
        for j in range(chunks - 1 - tl.program_id(2) if BACK else tl.program_id(2)):
            other = chunks - 1 - j if BACK else j
            sum_e = tl.load(faded + other * channels + e, inside, 0)
            left = before + (other * NP + n[:, None]) * channels + e[None, :]
            left = tl.load(tl.multiple_of(left, (4, 4)), inside[None, :], 0)
            h = tl.exp2(sum_e[None, :] * a2) * h + left
    for i in range(0, end - start, U):
        us, dts, ys, zs, outs = (), (), (), (), ()
        for k in tl.static_range(U):  # all loads of U tokens are under way before the first is used
            t = end - 1 - i - k if BACK else start + i + k
            there = e < tl.where(i + k < end - start, channels, 0)
            us = us + (tl.load(u + t * channels + e, there, 0),)
            dts = dts + (tl.load(delta + t * channels + e, there, 0),)
            if not FIRST:
                ys = ys + (tl.load(y + t * channels + e, there, 0),)
            if LAST and GATE:
                zs = zs + (tl.load(z + t * step_z + e, there, 0),)
        for k in tl.static_range(U):
            t = end - 1 - i - k if BACK else start + i + k
            # Beyond the end Δ is 0, which leaves the state as it is.
            there = e < tl.where(i + k < end - start, channels, 0)
            dt = _timescale(dts[k], there, bias_e, stretch, t, SOFTPLUS, STRETCH)
            u_t = us[k].to(tl.float32)
            row = tl.maximum(t, 0) if BACK else tl.minimum(t, length - 1)
            b_t = tl.load(b + row * step_t + n, n < N, 0).to(tl.float32)
            c_t = tl.load(c + row * step_t + n, n < N, 0).to(tl.float32)
            fade = tl.exp2(_decay(dt, idle_e, gap, t, length, BACK, GAP)[None, :] * a2)
            h = fade * h + (dt * u_t)[None, :] * b_t[:, None]
            y_t = d_e * u_t + tl.sum(h * c_t[:, None], 0)
            at = sums + t * tl.num_programs(0) + tl.program_id(0)
            if SUMS:
                tl.store(at, tl.sum(dt, 0), i + k < end - start)
                tl.store(at + step_k, tl.sum(dt * dt * u_t * u_t, 0), i + k < end - start)
            if OUTPUT:
                tl.store(at + 2 * step_k, tl.sum(tl.maximum(y_t, 0), 0), i + k < end - start)
            if not FIRST:
                y_t += ys[k].to(tl.float32)
            if LAST and GATE:
                z_t = zs[k].to(tl.float32)
                y_t *= scale * z_t / (1 + tl.exp2(-z_t * LOG2E))
            elif LAST:
                y_t *= scale
            outs = outs + (y_t,)
        for k in tl.static_range(U):
            t = end - 1 - i - k if BACK else start + i + k
            there = e < tl.where(i + k < end - start, channels, 0)
            tl.store(y + t * channels + e, outs[k].to(y.dtype.element_ty), there)


CONFIGS = [
    triton.Config({"CH": 32 * warps, "U": unroll}, num_warps=warps)
    for warps, unroll in ((1, 4), (1, 2), (1, 8), (2, 4), (4, 4))
]


@autotuned(CONFIGS, key=["channels", "N", "G", "SPLIT"])
@triton.jit(do_not_specialize=["length", "chunk"])
def _scan(u, delta, a, b, c, d, bias, z, gap, stretch, y, sums, before, faded,
          length, channels, chunk, step_z, step_g, step_b, step_t, scale,
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
                   (REVERSE >> g) & 1, g == 0, g == G - 1, GATE, SOFTPLUS, GAP, STRETCH, SUMS, OUTPUT, SPLIT, N, NP, CH,
                   U)  # fmt: skip
        tl.debug_barrier()  # the next direction adds to what this one stored


@triton.jit(do_not_specialize=["length", "chunk"])
def _chunk_states(u, delta, a, b, d, bias, gap, stretch, before, faded,
                  images, length, channels, chunk, step_g, step_b, step_t, reverse,
                  SOFTPLUS: tl.constexpr, GAP: tl.constexpr, STRETCH: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
                  CH: tl.constexpr):  # fmt: skip
    e = tl.program_id(0) * CH + tl.arange(0, CH)
    inside = e < channels
    each = tl.program_id(1).to(tl.int64)
    g, image = each // images, each % images
    back = (reverse >> g) & 1
    n = tl.arange(0, NP)
    a2, _, bias_e, idle_e = _constants(a + g * channels * N, d + g * channels, bias + g * channels, e, inside, channels,
                                       SOFTPLUS, GAP, N, NP)  # fmt: skip
    start = tl.program_id(2) * chunk
    count = tl.minimum(chunk, length - start)
    u += each * length * channels
    delta += each * length * channels
    b += g * step_g + image * step_b
    h = tl.zeros((NP, CH), tl.float32)
    total = tl.zeros((CH,), tl.float32)
    for i in range(count):
        t = start + count - 1 - i if back else start + i
        dt = _timescale(tl.load(delta + t * channels + e, inside, 0), inside, bias_e, stretch + image * length, t,
                        SOFTPLUS, STRETCH)  # fmt: skip
        write = dt * tl.load(u + t * channels + e, inside, 0).to(tl.float32)
        if GAP:
            crossed = t + back
            dt += tl.load(gap + image * length + crossed, mask=crossed < length, other=0).to(tl.float32) * idle_e
        b_t = tl.load(b + t * step_t + n, n < N, 0).to(tl.float32)
        h = tl.exp2(dt[None, :] * a2) * h + write[None, :] * b_t[:, None]
        total += dt
    at = each * tl.num_programs(2) + tl.program_id(2)
    tl.store(faded + at * channels + e, total, inside)
    tl.store(tl.multiple_of(before + (at * NP + n[:, None]) * channels + e[None, :], (4, 4)), h, inside[None, :])


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
    states, padded, blocks = a.shape[1], triton.next_power_of_2(a.shape[1]), triton.cdiv(channels, 32)
    b, c = aligned_rows(b, c)
    y = torch.empty_like(u[0])
    absent = y  # stands for a tensor the kernel does not read
    z_rows = absent if z is None else rows(z)
    gaps, stretches = (absent if t is None else t.contiguous() for t in (gap, stretch))
    mask = reverse_mask(reverse)
    chunk = chunk_length(length, directions * images * blocks, u.device)
    chunks = triton.cdiv(length, chunk)
    switches = {"SOFTPLUS": softplus, "GAP": gap is not None, "STRETCH": stretch is not None, "N": states, "NP": padded}
    before = faded = absent
    if chunks > 1:
        before = u.new_empty(directions, images, chunks, padded, channels, dtype=torch.float32)
        faded = u.new_empty(directions, images, chunks, channels, dtype=torch.float32)
        _chunk_states[blocks, directions * images, chunks](
            u, delta, a, b, d, bias, gaps, stretches, before, faded, images, length, channels, chunk,
            *b.stride()[:3], mask, **switches, CH=32, num_warps=1,
        )  # fmt: skip
    size = 3 * directions * images * length * blocks if sums or output else 1
    parts = u.new_empty(size, dtype=torch.float32)
    _scan[lambda meta: (triton.cdiv(channels, meta["CH"]), images, chunks)](
        u, delta, a, b, c, d, bias, z_rows, gaps, stretches, y, parts, before, faded,
        length, channels, chunk, z_rows.stride(1), *b.stride()[:3], scale,
        REVERSE=mask, G=directions, GATE=z is not None, **switches, SUMS=sums, OUTPUT=output, SPLIT=chunks > 1,
    )  # fmt: skip
    if not (sums or output):
        return y, parts.new_empty(directions, images, length, 0)
    used = triton.cdiv(channels, _scan.best_config.kwargs["CH"])
    parts = parts[: 3 * directions * images * length * used].view(3, directions, images, length, used)
    return y, parts.sum(-1).movedim(0, -1).contiguous()


def chunk_length(length: int, warps: int, device: torch.device) -> int:
    """How many tokens a program walks through: fewer than all where one walk a channel would leave the GPU idle."""
    wanted = min(fill(device) // max(warps, 1), CHUNKS, length // MIN_CHUNK)
    return triton.cdiv(length, max(wanted, 1))
