"""The scan of few images in one launch: a program scans all directions of its channels, in chunks side by side.

A thread owns some tokens in a row of one direction, one channel and NS of its states. It scans the tokens from a zero
state. Then one thread for each state walks along the chunks and finds the state before each, from which every thread
scans its tokens again. Last, the directions are added up.

Vectors have one entry for each thread of the program: threads exchange data through memory alone, which stays in the
cache.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.formulas import LOG2E, growth, silu, softplus
from mtr_lab.ops.gpu.occupancy import num_sms

CHANNELS, STATES, CHUNKS = 8, 8, 16  # channels of a program, states of a thread, chunks of a sequence at most
UNROLL = 7  # tokens that a thread loads at a time, at most
THREADS = 512  # of a program at most, so that a thread has 128 registers
MAX_LENGTH = 256  # tokens; longer sequences were not measured


def fits_together(directions: int, images: int, length: int, channels: int, states: int, device: torch.device) -> bool:
    """Whether this form is used, for ``states`` padded to a power of two: where all programs run at once.

    With 197 tokens, two images of Vim-S are 192 programs for the 132 multiprocessors of an H100, and 13 to 16 % slower
    than by ``scan_chunks``.
    """
    programs = images * triton.cdiv(channels, CHANNELS)
    threads = CHUNKS * triton.next_power_of_2(directions) * triton.cdiv(states, STATES) * CHANNELS
    return length <= MAX_LENGTH and threads <= THREADS and programs <= num_sms(device)


def chunks_and_warps(length: int, parts: int) -> tuple[int, int]:
    """The chunks of a sequence and the warps of a program, where ``parts`` threads share a token, powers of two."""
    chunks = min(CHUNKS, triton.next_power_of_2(length), THREADS // parts)
    chunks = max(chunks, 32 // parts)
    return chunks, chunks * parts // 32


def scan_together(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    bc: Tensor,
    d: Tensor,
    bias: Tensor,
    z: Tensor,
    gap: Tensor,
    factor: Tensor,
    y: Tensor,
    scale: float,
    parts: dict[str, Any],
) -> None:
    """Write y (B, L, E) of ``scan.scan``; the sum over directions is rounded once.

    Args:
        u, delta, a, bc, d, bias, z, gap, factor: as ``scan.scan`` passes them to its kernels.
        parts: constants of the kernel that tell which of them exist, from ``REVERSE`` to ``REPEATS``.
    """
    directions, images, length, channels = u.shape
    states = a.shape[1]
    own = min(STATES, states)
    sides = triton.next_power_of_2(directions)
    chunks, warps = chunks_and_warps(length, sides * (states // own) * CHANNELS)
    blocks = triton.cdiv(channels, CHANNELS)
    left = u.new_empty(images, blocks, sides, chunks, states, CHANNELS, dtype=torch.float32)
    spans = u.new_empty(images, blocks, sides, chunks, CHANNELS, dtype=torch.float32)
    sums = u.new_empty(images, directions, length, channels, dtype=torch.float32)
    run = triton.cdiv(length, chunks)
    unroll = triton.cdiv(run, triton.cdiv(run, UNROLL))
    _scan_together[blocks, images](
        u, delta, a, bc, d, bias, z, gap, factor, y, sums, left, spans, length, unroll * triton.cdiv(run, unroll),
        channels, z.stride(1), *bc.stride()[:3], scale, G=directions, GP=sides, NP=states, NS=own,
        CH=CHANNELS, CHUNKS=chunks, U=unroll, num_warps=warps, **parts,
    )  # fmt: skip


@triton.jit
def _four(x, mask):
    """Four neighbouring numbers of each thread, as vectors, by one load."""
    four = tl.load(x[:, None] + tl.arange(0, 4)[None, :], mask[:, None], 0).to(tl.float32)
    even, odd = tl.split(tl.reshape(four, (x.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _neighbours(x, mask, n: tl.constexpr):
    """n neighbouring numbers of each thread, n a power of two."""
    xs = ()
    if n < 4:
        for i in tl.static_range(n):
            xs = xs + (tl.load(x + i, mask, 0).to(tl.float32),)
    else:
        for i in tl.static_range(0, n, 4):
            xs = xs + _four(x + i, mask)
    return xs


@triton.jit
def scan_chunks(h, rates, u, delta, bc, skip, bias, idle, gap, factor, sums, start, sign, low, high, mask, writes,
                length, run, width: tl.constexpr, stride_bc: tl.constexpr, OUTPUT: tl.constexpr, SOFTPLUS: tl.constexpr,
                GAP: tl.constexpr, DELTA_SCALE: tl.constexpr, REPEATS: tl.constexpr, NP: tl.constexpr,
                S: tl.constexpr, CH: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """Scan ``run`` tokens of each thread from ``start`` on, forwards or, where ``sign`` is -1, backwards.

    Tokens before ``low`` and from ``high`` on change nothing. Pointers are to token 0 of the channel of a thread.

    Args:
        h: the NS states before, of each thread.
        rates: A / ln 2 of these states.
        skip: D in one thread of each channel, 0 in the others.
        idle: Δ of a token without input.
        writes: whether a thread writes the output of its channel.
        OUTPUT: whether to write the output of the direction, summed over the threads of a channel, to ``sums``.

    Returns:
        The states after, and the sum of Δ with gaps.
    """
    NS: tl.constexpr = len(h)
    total = tl.zeros(start.shape, tl.float32)
    for i in tl.range(0, run, U, num_stages=1):
        for j in tl.static_range(U):
            t = start + sign * (i + j)
            exists = mask & (t >= low) & (t < high)
            dt = tl.load(delta + t * width, exists, 0).to(tl.float32)
            u_t = tl.load(u + t * width, exists, 0).to(tl.float32)
            times = dt
            if DELTA_SCALE or REPEATS:
                times = tl.load(factor + t, exists, 1).to(tl.float32)
            if SOFTPLUS:
                dt = tl.where(exists, softplus(dt + bias), 0)
            if DELTA_SCALE:
                dt *= times
            span = dt
            if REPEATS:
                span *= times
            if GAP:
                s = tl.where(sign < 0, length - 1 - t, t)
                span += tl.load(gap + s, exists, 0).to(tl.float32) * idle
            total += span
            b = _neighbours(bc + t * stride_bc, exists, NS)
            after = ()
            for n in tl.static_range(NS):
                update = dt * u_t * b[n]
                if REPEATS:
                    update *= growth(dt * rates[n], times)
                after = after + (tl.exp2(span * rates[n]) * h[n] + update,)
            h = after
            if OUTPUT:
                c = _neighbours(bc + t * stride_bc + NP, exists, NS)
                y_t = skip * u_t
                for n in tl.static_range(NS):
                    y_t += h[n] * c[n]
                if S > 1:
                    y_t = tl.reshape(y_t, (start.shape[0] // (S * CH), S, CH))
                    y_t = tl.reshape(tl.broadcast_to(tl.sum(y_t, 1, keep_dims=True), y_t.shape), start.shape)
                tl.store(sums + t * width, y_t, exists & writes)
    return h, total


@triton.jit
def zeros(n: tl.constexpr, T: tl.constexpr):
    """n vectors of zeros."""
    xs = ()
    for _ in tl.static_range(n):
        xs = xs + (tl.zeros((T,), tl.float32),)
    return xs


@triton.jit
def load_rates(a, g, part, e, mask, width: tl.constexpr, NP: tl.constexpr, NS: tl.constexpr):
    """A / ln 2 of the states of each thread."""
    xs = ()
    for n in tl.static_range(NS):
        xs = xs + (tl.load(a + (g * NP + part * NS + n) * width + e, mask, 0) * LOG2E,)
    return xs


@triton.jit
def _states_before(a, left, spans, e0, thread, width: tl.constexpr, REVERSE: tl.constexpr, G: tl.constexpr,
                   NP: tl.constexpr, CH: tl.constexpr, CHUNKS: tl.constexpr):  # fmt: skip
    """Replace the states that chunks leave by those before them. A thread for each state, in every direction."""
    T: tl.constexpr = thread.shape[0]
    for i in tl.static_range(0, G * NP * CH, T):
        exists = i + thread < G * NP * CH
        g, state = (i + thread) // (NP * CH), (i + thread) % (NP * CH)
        own = state % CH
        a_n = tl.load(a + (g * NP + state // CH) * width + e0 + own, exists & (e0 + own < width), 0) * LOG2E
        backward = (REVERSE >> g) & 1
        step = 1 - 2 * backward
        chunk = g * CHUNKS + backward * (CHUNKS - 1)
        states, passed = (), ()
        for j in tl.static_range(CHUNKS - 1):
            states = states + (tl.load(left + (chunk + step * j) * (CH * NP) + state, exists, 0),)
            passed = passed + (tl.load(spans + (chunk + step * j) * CH + own, exists, 0),)
        before = tl.zeros((T,), tl.float32)
        for j in tl.static_range(CHUNKS):
            tl.store(left + (chunk + step * j) * (CH * NP) + state, before, exists)
            if j < CHUNKS - 1:
                before = tl.exp2(passed[j] * a_n) * before + states[j]


@triton.jit(do_not_specialize=["length", "run"])
def _scan_together(u, delta, a, bc, d, bias, z, gap, factor, y, sums, left, spans, length, run, width: tl.constexpr,
                   stride_z: tl.constexpr, stride_g, stride_b, stride_bc: tl.constexpr, scale, REVERSE: tl.constexpr,
                   GATE: tl.constexpr, SOFTPLUS: tl.constexpr, GAP: tl.constexpr, DELTA_SCALE: tl.constexpr,
                   REPEATS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, NP: tl.constexpr, NS: tl.constexpr,
                   CH: tl.constexpr, CHUNKS: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """CH channels of one image."""
    S: tl.constexpr = NP // NS  # threads of a channel
    T: tl.constexpr = GP * CHUNKS * S * CH
    thread = tl.arange(0, T)
    own, part, chunk, g = thread % CH, thread // CH % S, thread // (CH * S) % CHUNKS, thread // (CH * S * CHUNKS)
    e = tl.program_id(0) * CH + own
    mask = (e < width) & (g < G)
    image, images = tl.program_id(1), tl.num_programs(1)
    place = (image * tl.num_programs(0) + tl.program_id(0)) * (GP * CHUNKS)
    left += place * (CH * NP)
    spans += place * CH
    sums += image * G * length * width
    backward = (REVERSE >> g) & 1
    start = chunk * run + backward * (run - 1)
    rates = load_rates(a, g, part, e, mask, width, NP, NS)
    bias_e = tl.zeros((T,), tl.float32)
    if SOFTPLUS or GAP:
        bias_e = tl.load(bias + g * width + e, mask, 0)
    idle = softplus(bias_e)
    skip = tl.load(d + g * width + e, mask & (part == 0), 0)
    rows = (g * images + image) * length * width + e
    b = bc + g * stride_g + image * stride_b + part * NS
    gaps, factors, out = gap + (image * G + g) * length, factor + image * length, sums + g * length * width + e
    mine = left + thread // (CH * S) * (CH * NP) + part * (NS * CH) + own
    h, total = scan_chunks(zeros(NS, T), rates, u + rows, delta + rows, b, skip, bias_e, idle, gaps, factors, out,
                           start, 1 - 2 * backward, 0, length, mask, part == 0, length, run, width, stride_bc, False,
                           SOFTPLUS, GAP, DELTA_SCALE, REPEATS, NP, S, CH, U)  # fmt: skip
    for n in tl.static_range(NS):
        tl.store(mine + n * CH, h[n])
    tl.store(spans + thread // (CH * S) * CH + own, total, part == 0)
    tl.debug_barrier()
    _states_before(a, left, spans, tl.program_id(0) * CH, thread, width, REVERSE, G, NP, CH, CHUNKS)
    tl.debug_barrier()
    before = ()
    for n in tl.static_range(NS):
        before = before + (tl.load(mine + n * CH),)
    scan_chunks(before, rates, u + rows, delta + rows, b, skip, bias_e, idle, gaps, factors, out, start,
                1 - 2 * backward, 0, length, mask, part == 0, length, run, width, stride_bc, True, SOFTPLUS, GAP,
                DELTA_SCALE, REPEATS, NP, S, CH, U)  # fmt: skip
    tl.debug_barrier()

    e = tl.program_id(0) * CH + thread % CH
    y += image * length * width
    z += image * length * stride_z
    for t0 in tl.range(0, length, 4 * (T // CH), num_stages=1):
        for k in tl.static_range(4):
            t = t0 + k * (T // CH) + thread // CH
            exists = (e < width) & (t < length)
            total = tl.zeros((T,), tl.float32)
            for side in tl.static_range(G):
                total += tl.load(sums + (side * length + t) * width + e, exists, 0)
            total *= scale
            if GATE:
                z_t = tl.load(z + t * stride_z + e, exists, 0).to(tl.float32)
                total *= silu(z_t)
            tl.store(y + t * width + e, total.to(y.dtype.element_ty), exists)
