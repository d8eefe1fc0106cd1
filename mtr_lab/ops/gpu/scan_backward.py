"""The gradients of the selective scan: the recurrence backwards in time, one launch for all directions.

One warp owns 32 channels of one direction of one image, with all their states, and walks over the tokens. The states a
token arrives at are needed in the reverse of the order they come about in, so the first kernel keeps those at the start
of every chunk of √L/2 tokens; the second goes over the chunks from the last to the first, computes a chunk's states
again into a buffer and reads that backwards. This takes memory for 2.5√L tokens' states instead of L. Chunks of √L
would take the least, 2√L, but the buffer is written once a token and the smaller it is, the likelier it stays cached.

The compiler gives a thread 4 channels times 4 states. With one channel and its 16 states a thread, the sums over the
states would need no other thread, but those over the channels, for B and C, are as many and would need all the more.

Sums over the channels or the images are written as one part a program and added afterwards: the result does not depend
on which program finishes first.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.launch import reverse_mask
from mtr_lab.ops.gpu.scan import softplus

STATES = 512  # a program's channels times states, 16 a thread: what fits the registers of one warp
REGISTERS = 168  # a thread: the most that lets 12 warps share a Hopper multiprocessor; the compiler alone takes 230
VARYING = ["length", "chunk", "reverse"]  # no kernel of its own for a length of 1 or a multiple of 16


def selective_scan_backward(
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
    grad_y: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of ``selective_scan_reference`` in its floating-point inputs.

    Data may be float32, float16 or bfloat16 and weights of any floating dtype; the state and all sums are float32. The
    result is deterministic.

    Args:
        u, delta, A, B, C, D, z, delta_bias, gap, stretch, reverse: as for ``selective_scan``. ``B``, ``C`` and ``z``
            are read in place if their last stride is 1.
        grad_y: the gradient of the output, (B, L, E).

    Returns:
        The gradients of u, delta, A, B, C, D, z and delta_bias, each in the shape and dtype of its input, None for
        those that are None.
    """
    directions, images, length, channels = u.shape
    states = A.shape[2]
    u, delta, A, D, grad_y = (t.contiguous() for t in (u, delta, A, D, grad_y))
    delta_bias, gap, stretch = (None if t is None else t.contiguous() for t in (delta_bias, gap, stretch))
    B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (B, C))
    if z is not None and z.stride(-1) != 1:
        z = z.contiguous()

    padded = triton.next_power_of_2(states)
    block = max(1, min(32, STATES // padded))
    blocks = triton.cdiv(channels, block)
    chunk = math.isqrt(length) // 2 + 1
    chunks = triton.cdiv(length, chunk)
    grid = (blocks, images, directions)
    programs = blocks * images * directions
    starts = u.new_empty(programs, chunks - 1, padded, block, dtype=torch.float32)
    arrivals = u.new_empty(programs, chunk, padded, block, dtype=torch.float32)

    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dz = None if z is None else z.new_empty(u.shape)
    dB, dC = (u.new_empty(blocks, directions, images, length, states, dtype=torch.float32) for _ in range(2))
    dA = u.new_empty(directions, images, channels, states, dtype=torch.float32)
    dD, dbias = (u.new_empty(directions, images, channels, dtype=torch.float32) for _ in range(2))

    shape = {
        "length": length,
        "channels": channels,
        "chunk": chunk,
        "reverse": reverse_mask(reverse),
    }
    options = {"N": states, "PADDED": padded, "BLOCK": block, "num_warps": 1}
    if torch.version.hip is None:  # an option of NVIDIA's compiler
        options["maxnreg"] = REGISTERS
    _chunk_starts[grid](
        u, delta, A, B, delta_bias, gap, stretch, starts, *B.stride()[:3], **shape, **options
    )  # fmt: skip
    _scan_backward[grid](
        u, delta, A, B, C, D, z, delta_bias, gap, stretch, grad_y, starts, arrivals,
        du, ddelta, dA, dB, dC, dD, dz, dbias,
        *B.stride()[:3], *C.stride()[:3], *((0, 0) if z is None else z.stride()[:2]), **shape, **options,
    )  # fmt: skip
    return (
        du,
        ddelta,
        dA.sum(1).to(A.dtype),
        dB.sum(0).to(B.dtype),
        dC.sum(0).to(C.dtype),
        dD.sum(1).to(D.dtype),
        None if dz is None else dz.sum(0),
        None if delta_bias is None else dbias.sum(1).to(delta_bias.dtype),
    )


@triton.jit
def _program(length, channels, reverse, BLOCK: tl.constexpr):
    """This program's direction, image, channels and number, and the direction's first token and step to the next.

    Direction and image have 64 bits, and so has what is computed from them: a tensor may have over 2³¹ elements.
    """
    block, image, g = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    number = (g * tl.num_programs(1) + image) * tl.num_programs(0) + block
    backward = (reverse >> tl.program_id(2)) & 1
    return g, image, block * BLOCK + tl.arange(0, BLOCK), number, backward * (length - 1), 1 - 2 * backward


@triton.jit
def _weights(a, bias, g, e, n, channels, N: tl.constexpr):
    """A for powers of two (N, channels), the bias, and Δ of a removed token."""
    at = g * channels + e
    a2 = tl.load(a + at[None, :] * N + n[:, None], (e < channels)[None, :] & (n < N)[:, None], 0).to(tl.float32)
    bias_e = tl.zeros(e.shape, tl.float32)
    if bias is not None:
        bias_e = tl.load(bias + at, e < channels, 0).to(tl.float32)
    return a2 * 1.4426950408889634, bias_e, softplus(bias_e)


@triton.jit
def _timescale(x, idle, gap, stretch, t, step, length):
    """Δ, the stretch and the gap of token t, and how long the state decays before it."""
    dt = softplus(x)
    stretch_t = 1.0
    if stretch is not None:
        stretch_t = tl.load(stretch + t).to(tl.float32)
        dt *= stretch_t
    gap_t = 0.0
    span = dt
    if gap is not None:
        # A backward scan crosses the gap in front of token t + 1 when it arrives at token t.
        crossed = tl.where(step > 0, t, t + 1)
        gap_t = tl.load(gap + crossed, crossed < length, 0).to(tl.float32)
        span += gap_t * idle
    return dt, stretch_t, gap_t, span


@triton.jit
def _advance(h, u_t, delta_t, b_t, a2, bias_e, idle, gap, stretch, t, step, length):
    """The state after token t."""
    dt, _, _, span = _timescale(delta_t.to(tl.float32) + bias_e, idle, gap, stretch, t, step, length)
    write = dt * u_t.to(tl.float32)
    return tl.exp2(span[None, :] * a2) * h + write[None, :] * b_t.to(tl.float32)[:, None]


@triton.jit
def _token(u, delta, b, at, b_at, inside, in_state):
    return tl.load(u + at, inside, 0), tl.load(delta + at, inside, 0), tl.load(b + b_at, in_state, 0)


@triton.jit(do_not_specialize=VARYING)
def _chunk_starts(u, delta, a, b, bias, gap, stretch, starts, b_g, b_i, b_l, length, channels, chunk, reverse,
                  N: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Keep the state before the first token of every chunk but the first: (programs, chunks - 1, N, channels)."""
    g, image, e, number, t, step = _program(length, channels, reverse, BLOCK)
    n = tl.arange(0, PADDED)
    inside, in_state = e < channels, n < N
    a2, bias_e, idle = _weights(a, bias, g, e, n, channels, N)
    row = (g * tl.num_programs(1) + image) * length
    u += row * channels
    delta += row * channels
    b += g * b_g + image * b_i
    if gap is not None:
        gap += image * length
    if stretch is not None:
        stretch += image * length
    kept = tl.cdiv(length, chunk) - 1
    starts += number * kept * PADDED * BLOCK + n[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]

    h = tl.zeros((PADDED, BLOCK), tl.float32)
    u_n, delta_n, b_n = _token(u, delta, b, t * channels + e, t * b_l + n, inside, in_state)
    for _ in range(kept):
        for _ in range(chunk):
            u_t, delta_t, b_t = u_n, delta_n, b_n
            # What the next token needs is on its way while this one is computed.
            after = t + step
            u_n, delta_n, b_n = _token(u, delta, b, after * channels + e, after * b_l + n, inside, in_state)
            h = _advance(h, u_t, delta_t, b_t, a2, bias_e, idle, gap, stretch, t, step, length)
            t = after
        tl.store(starts, h)
        starts += PADDED * BLOCK


@triton.jit(do_not_specialize=VARYING)
def _scan_backward(u, delta, a, b, c, d, z, bias, gap, stretch, dy, starts, arrivals,
                   du, ddelta, da, db, dc, dd, dz, dbias,
                   b_g, b_i, b_l, c_g, c_i, c_l, z_i, z_l, length, channels, chunk, reverse,
                   N: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    g, image, e, number, origin, step = _program(length, channels, reverse, BLOCK)
    n = tl.arange(0, PADDED)
    inside, in_state = e < channels, n < N
    a2, bias_e, idle = _weights(a, bias, g, e, n, channels, N)
    images = tl.num_programs(1)
    row = (g * images + image) * length
    u += row * channels
    delta += row * channels
    du += row * channels
    ddelta += row * channels
    dy += image * length * channels
    b += g * b_g + image * b_i
    c += g * c_g + image * c_i
    if z is not None:
        z += image * z_i
        dz += row * channels
    if gap is not None:
        gap += image * length
    if stretch is not None:
        stretch += image * length
    part = tl.program_id(0).to(tl.int64) * tl.num_programs(2) * images * length + row
    db += part * N
    dc += part * N
    d_e = tl.load(d + g * channels + e, inside, 0).to(tl.float32)
    tile = n[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    kept = tl.cdiv(length, chunk) - 1
    starts += number * kept * PADDED * BLOCK
    arrivals += number * chunk * PADDED * BLOCK

    dh = tl.zeros((PADDED, BLOCK), tl.float32)
    da_e = tl.zeros((PADDED, BLOCK), tl.float32)
    dd_e = tl.zeros((BLOCK,), tl.float32)
    dbias_e = tl.zeros((BLOCK,), tl.float32)
    didle_e = tl.zeros((BLOCK,), tl.float32)
    for k in range(kept, -1, -1):
        first = origin + step * k * chunk
        count = tl.minimum(chunk, length - k * chunk)
        h = tl.load(starts + (k - 1) * PADDED * BLOCK + tile, k > 0, 0)
        u_n, delta_n, b_n = _token(u, delta, b, first * channels + e, first * b_l + n, inside, in_state)
        for i in range(count):
            t = first + step * i
            u_t, delta_t, b_t = u_n, delta_n, b_n
            # What the next token needs is on its way while this one is computed; after the last comes itself.
            after = first + step * tl.minimum(i + 1, count - 1)
            u_n, delta_n, b_n = _token(u, delta, b, after * channels + e, after * b_l + n, inside, in_state)
            tl.store(arrivals + i * PADDED * BLOCK + tile, h)
            h = _advance(h, u_t, delta_t, b_t, a2, bias_e, idle, gap, stretch, t, step, length)

        tl.debug_barrier()  # a state may be read by another thread than wrote it
        t = first + step * (count - 1)
        dy_n = tl.load(dy + t * channels + e, inside, 0)
        z_n = dy_n if z is None else tl.load(z + t * z_l + e, inside, 0)
        c_n = tl.load(c + t * c_l + n, in_state, 0)
        for i in range(count - 1, -1, -1):
            # h is the state after token t, arrival the one before it.
            t = first + step * i
            arrival = tl.load(arrivals + i * PADDED * BLOCK + tile)
            x = delta_n.to(tl.float32) + bias_e
            u_t, dy_t, z_t = u_n.to(tl.float32), dy_n.to(tl.float32), z_n.to(tl.float32)
            b_t, c_t = b_n.to(tl.float32)[:, None], c_n.to(tl.float32)[:, None]
            after = first + step * tl.maximum(i - 1, 0)
            u_n, delta_n, b_n = _token(u, delta, b, after * channels + e, after * b_l + n, inside, in_state)
            dy_n = tl.load(dy + after * channels + e, inside, 0)
            z_n = dy_n if z is None else tl.load(z + after * z_l + e, inside, 0)
            c_n = tl.load(c + after * c_l + n, in_state, 0)

            dt, stretch_t, gap_t, span = _timescale(x, idle, gap, stretch, t, step, length)
            write = dt * u_t
            at = t * channels + e
            if z is not None:
                s = tl.sigmoid(z_t)
                y = tl.sum(h * c_t, 0) + d_e * u_t
                tl.store(dz + at, (dy_t * y * s * (1 + z_t * (1 - s))).to(dz.dtype.element_ty), inside)
                dy_t *= z_t * s
            dh += dy_t[None, :] * c_t
            tl.store(dc + t * N + n, tl.sum(dy_t[None, :] * h, 1), in_state)
            tl.store(db + t * N + n, tl.sum(dh * write[None, :], 1), in_state)
            dwrite = tl.sum(dh * b_t, 0)
            dh *= tl.exp2(span[None, :] * a2)
            q = dh * arrival  # the gradient of the exponent span · A
            da_e += q * span[None, :]
            dspan = tl.sum(q * a2, 0) * 0.6931471805599453
            ddelta_t = (dspan + u_t * dwrite) * stretch_t * tl.sigmoid(x)
            didle_e += gap_t * dspan
            dd_e += dy_t * u_t
            dbias_e += ddelta_t
            tl.store(du + at, (dt * dwrite + d_e * dy_t).to(du.dtype.element_ty), inside)
            tl.store(ddelta + at, ddelta_t.to(ddelta.dtype.element_ty), inside)
            h = arrival
        tl.debug_barrier()
    at = (g * images + image) * channels + e
    tl.store(da + at[None, :] * N + n[:, None], da_e, inside[None, :] & in_state[:, None])
    tl.store(dd + at, dd_e, inside)
    tl.store(dbias + at, dbias_e + didle_e * tl.sigmoid(bias_e), inside)
