"""The last launch of ``mixer_read`` for few images: the scans up to the token that is read, in chunks side by side.

As in ``scan_together``, a thread owns one channel, some of its states and some tokens in a row. Only the state at the
token is needed: one thread for each state walks along the chunks, and the products with C are added up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.formulas import LOG2E, silu, softplus
from mtr_lab.ops.gpu.scan_together import THREADS, chunks_and_warps, load_rates, scan_chunks, zeros

CHANNELS, STATES, UNROLL = 8, 8, 4  # channels of a program, states of a thread, tokens that it loads at a time


def can_read_together(states: int) -> bool:
    """Whether a program has enough threads for its channels, each with this number of states in both directions."""
    return 2 * triton.cdiv(states, STATES) * CHANNELS <= THREADS


def read_together(
    u: Tensor,
    delta: Tensor,
    bc: Tensor,
    a: Tensor,
    d: Tensor,
    bias: Tensor,
    z: Tensor,
    read: Tensor,
    gap: Tensor,
    factor: Tensor,
    y: Tensor,
    scale: float,
    parts: dict[str, bool],
) -> None:
    """Write y (B, 1, E), given the L + 1 rows of u, Δ, and B and C of each image; arguments are contiguous.

    Args:
        parts: constants of the kernel that tell which of ``gap`` and ``factor`` exist: ``GAP``, ``DELTA_SCALE``,
            ``REPEATS``.
    """
    images, rows, channels = u.shape
    padded = a.shape[1]
    own = min(STATES, padded)
    chunks, warps = chunks_and_warps(rows, 2 * (padded // own) * CHANNELS)
    blocks = triton.cdiv(channels, CHANNELS)
    left = u.new_empty(images, blocks, 2, chunks, CHANNELS * padded, dtype=torch.float32)
    spans = u.new_empty(images, blocks, 2, chunks, CHANNELS, dtype=torch.float32)
    _read_together[blocks, images](
        u, delta, a, bc, d, bias, z, read, gap, factor, y, left, spans, rows - 1, channels, scale, NP=padded, NS=own,
        CH=CHANNELS, CHUNKS=chunks, U=UNROLL, num_warps=warps, **parts,
    )  # fmt: skip


@triton.jit(do_not_specialize=["length"])
def _read_together(u, delta, a, bc, d, bias, z, read, gap, factor, y, left, spans, length, width: tl.constexpr, scale,
                   GAP: tl.constexpr, DELTA_SCALE: tl.constexpr, REPEATS: tl.constexpr, NP: tl.constexpr,
                   NS: tl.constexpr, CH: tl.constexpr, CHUNKS: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """CH channels of one image."""
    S: tl.constexpr = NP // NS  # threads of a channel
    T: tl.constexpr = 2 * CHUNKS * S * CH
    thread = tl.arange(0, T)
    own, part, chunk, side = thread % CH, thread // CH % S, thread // (CH * S) % CHUNKS, thread // (CH * S * CHUNKS)
    e = tl.program_id(0) * CH + own
    mask = e < width
    image = tl.program_id(1).to(tl.int64)
    p = tl.load(read + image).to(tl.int32)
    place = (image * tl.num_programs(0) + tl.program_id(0)) * (2 * CHUNKS)
    left += place * (CH * NP)
    spans += place * CH
    low, high = p * side, tl.where(side == 1, length, p + 1)
    run = tl.cdiv(tl.cdiv(tl.maximum(length - p, p + 1), CHUNKS), U) * U
    start = low + chunk * run + side * (run - 1)
    bias_e = tl.zeros((T,), tl.float32)
    if GAP:
        bias_e = tl.load(bias + side * width + e, mask, 0)
    # Row t of the forward direction is token t, of the backward direction token t - 1.
    first_row = image * (length + 1)
    at = (first_row + side) * width + e
    h, total = scan_chunks(zeros(NS, T), load_rates(a, side, part, e, mask, width, NP, NS), u + at, delta + at,
                           bc + (first_row + side) * (2 * NP) + part * NS, bias_e, bias_e, softplus(bias_e),
                           gap + (image * 2 + side) * length, factor + image * length, y, start, 1 - 2 * side, low,
                           high, mask, mask, length, run, width, 2 * NP, False, False, GAP, DELTA_SCALE, REPEATS, NP,
                           S, CH, U)  # fmt: skip
    mine = thread // (CH * S) * CH
    for n in tl.static_range(NS):
        tl.store(left + mine * NP + (part * NS + n) * CH + own, h[n])
    tl.store(spans + mine + own, total, part == 0)
    tl.debug_barrier()

    out = tl.zeros((T,), tl.float32)
    for i in tl.static_range(0, 2 * NP * CH, T):
        exists = i + thread < 2 * NP * CH
        g, n = (i + thread) // (NP * CH), (i + thread) // CH % NP
        a_n = tl.load(a + (g * NP + n) * width + e, exists & mask, 0) * LOG2E
        row = first_row + p + g
        c_n = tl.load(bc + row * (2 * NP) + NP + n, exists, 0)
        skip = tl.load(d + g * width + e, exists & mask & (n == 0), 0)
        u_e = tl.load(u + row * width + e, exists & mask & (n == 0), 0).to(tl.float32)
        state = tl.zeros((T,), tl.float32)
        for j in tl.static_range(CHUNKS):
            at = g * CHUNKS + tl.where(g == 1, CHUNKS - 1 - j, j)
            span = tl.load(spans + at * CH + own, exists, 0)
            state = tl.exp2(span * a_n) * state + tl.load(left + (at * NP + n) * CH + own, exists, 0)
        out += c_n * state + skip * u_e
    out = tl.sum(tl.reshape(out, (T // CH, CH)), 0)
    e = tl.program_id(0) * CH + tl.arange(0, CH)
    z_e = tl.load(z + image * width + e, e < width, 0).to(tl.float32)
    out *= scale * silu(z_e)
    tl.store(y + image * width + e, out.to(y.dtype.element_ty), e < width)
