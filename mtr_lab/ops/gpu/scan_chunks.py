"""The first of two passes over a sequence that is scanned in chunks: the state that each chunk leaves to the next.

A chunk starts from a zero state, so that all run at once. The second pass, in ``scan``, adds up the states of the
chunks before its own and scans from their sum.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.occupancy import resident_warps, reverse_mask
from mtr_lab.ops.gpu.scan_walk import Direction, Options, load_channels, tile, walk_states

CHANNELS = 64  # of a program, which is one warp
UNROLL = 4  # tokens loaded at a time
MAX_CHUNKS = 24  # of a sequence: each program of the second pass adds up the chunks before its own
MIN_CHUNK = 8  # tokens: with fewer, the second pass costs more than the chunks gain
MIN_ROOM = 5  # chunk only if this many times the programs of a whole scan fit; chunking reads everything twice


def chunk_length(length: int, warps: int, device: torch.device) -> int:
    """The number of tokens of a chunk, a multiple of ``UNROLL``, or ``length`` to scan sequences whole.

    Args:
        warps: the number of programs that would scan whole sequences.
    """
    room = resident_warps(device) // max(warps, 1)
    wanted = min(room, MAX_CHUNKS, length // MIN_CHUNK)
    return length if room < MIN_ROOM or wanted < 2 else UNROLL * triton.cdiv(length, wanted * UNROLL)


def chunk_states(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    bc: Tensor,
    d: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    gap: Tensor | None,
    delta_scale: Tensor | None,
    reverse: Sequence[int],
    chunk: int,
    *,
    softplus: bool,
    repeats: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The state after each chunk of ``chunk`` tokens, from a zero state before it. Arguments as of ``scan.scan``.

    Returns:
        The states (G, B, chunks, N, E), and the sums of Δ and of the gaps crossed in each chunk, (G, B, chunks, E).
    """
    directions, images, length, channels = u.shape
    grid = triton.cdiv(channels, CHANNELS), directions * images, triton.cdiv(length, chunk)
    left = u.new_empty(directions, images, grid[2], a.shape[1], channels, dtype=torch.float32)
    spans = u.new_empty(directions, images, grid[2], channels, dtype=torch.float32)
    absent = u  # stands for a tensor that the kernel does not read
    factor = delta_scale if repeats is None else repeats
    gap_or_absent, factor_or_absent = (absent if t is None else t.contiguous() for t in (gap, factor))
    _chunk_states[grid](
        u, delta, a, bc, d, torch.zeros_like(d) if bias is None else bias,
        None if order is None else order.contiguous(), gap_or_absent, factor_or_absent, left, spans, images, length,
        channels, chunk, *bc.stride()[:3],
        REVERSE=reverse_mask(reverse), G=directions, SOFTPLUS=softplus, GAP=gap is not None,
        DELTA_SCALE=delta_scale is not None, REPEATS=repeats is not None, NP=a.shape[1], CH=CHANNELS, U=UNROLL,
        num_warps=1,
    )  # fmt: skip
    return left, spans


@triton.jit(do_not_specialize=["length", "chunk"])
def _chunk_states(u, delta, a, bc, d, bias, order, gap, factor, left, spans,
                  images, length, width: tl.constexpr, chunk, stride_g, stride_b, stride_bc: tl.constexpr,
                  REVERSE: tl.constexpr, G: tl.constexpr, SOFTPLUS: tl.constexpr, GAP: tl.constexpr,
                  DELTA_SCALE: tl.constexpr, REPEATS: tl.constexpr, NP: tl.constexpr, CH: tl.constexpr,
                  U: tl.constexpr):  # fmt: skip
    """A program for each chunk of each direction of each image."""
    e = tl.program_id(0) * CH + tl.arange(0, CH)
    mask = e < width
    row = tl.program_id(1).to(tl.int64)
    image = row % images
    start = tl.program_id(2) * chunk
    count = tl.minimum(chunk, length - start)
    at = row * tl.num_programs(2) + tl.program_id(2)
    u += row * length * width
    delta += row * length * width
    gap += (image * G + row // images) * length
    factor += image * length
    if order is not None:
        order += row * length
    for g in tl.static_range(G):
        if row // images == g:
            channels = load_channels(a + g * width * NP, d + g * width, bias + g * width, e, mask, width, SOFTPLUS,
                                     GAP, NP, CH)  # fmt: skip
            h = tl.zeros((NP, CH), tl.float32)
            total = tl.zeros((CH,), tl.float32)
            h, total = walk_states(
                h, total, Direction(u, delta, bc + g * stride_g + image * stride_b, None, order, gap, factor, None,
                                    None, length, width, None, stride_bc, None, None, None),
                channels, start, count,
                Options((REVERSE >> g) & 1, False, False, False, SOFTPLUS, GAP, DELTA_SCALE, REPEATS, width % CH == 0,
                        0, None),
                U)  # fmt: skip
            tl.store(spans + at * width + e, total, mask)
            tl.store(tile(left + at * NP * width, e, width, NP, CH), h, mask[None, :])
