"""The selective scan as Triton kernels: every direction of a block, skip connection and gate, and their sum.

How one program walks through tokens is in ``scan_walk``. One of four forms is chosen by the batch size:

* whole: a program scans its channels of an image in every direction, one after the other. For large batches.
* halves: two opposite directions, a program for each, in two launches: both scan to the middle, then each adds to the
  half that the other has written. For small batches.
* chunks: two passes over chunks of the sequence, see ``scan_chunks``. For very small batches.
* together: as chunks, in one launch, see ``scan_together``. For very small batches of short sequences.

With an ``order``, tokens are gathered by index, in kernels that are compiled separately; ``halves`` and ``together``
are not used. ``together`` computes no statistics.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.formulas import terms
from mtr_lab.ops.gpu.occupancy import STAGES, check_launch, num_sms, on_its_device, registers, reverse_mask, rows
from mtr_lab.ops.gpu.scan_chunks import CHANNELS, UNROLL, chunk_length, chunk_states
from mtr_lab.ops.gpu.scan_together import fits_together, scan_together
from mtr_lab.ops.gpu.scan_walk import SAVE_EVERY, Direction, Options, load_channels, tile, walk
from mtr_lab.ops.scan_inputs import ScanInputs

UNROLL_HALF = 8  # tokens that a program of ``_scan_half`` loads at a time: more than ``UNROLL``, as fewer programs run
REGISTERS = registers(168)  # fewer, 128 or 104, fit more warps and are slower


@on_its_device
def selective_scan(inputs: ScanInputs, stats: Sequence[str]) -> tuple[Tensor, Tensor]:
    """As ``mtr_lab.ops.scan_reference.selective_scan_reference``, on a GPU."""
    u, delta, A, B, C, D, z, delta_bias, order, gap, delta_scale, repeats, reverse = inputs
    if delta_bias is None:
        delta_bias = torch.zeros_like(D)
    more = triton.next_power_of_2(A.shape[2]) - A.shape[2]  # states that stay zero
    return scan(
        u.contiguous(), delta.contiguous(), F.pad(A.float().transpose(1, 2), (0, 0, 0, more)).contiguous(),
        torch.cat([F.pad(B, (0, more)), F.pad(C, (0, more))], dim=3), D.float().contiguous(), z,
        delta_bias.float().contiguous(), order, gap, delta_scale, reverse, stats, softplus=True, repeats=repeats,
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
    delta_scale: Tensor | None,
    reverse: Sequence[int],
    stats: Sequence[str],
    *,
    softplus: bool,
    repeats: Tensor | None = None,
    scale: float = 1.0,
    saved: Tensor | None = None,
    ungated: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``selective_scan`` with packed parameters.

    The sum over directions is accumulated in y: in half precision it is rounded after every direction, but once by
    ``scan_together``, which scans few short sequences.

    Args:
        u: (G, B, L, E), contiguous.
        delta: (G, B, L, E), contiguous, of any floating dtype.
        a: (G, N, E) float32, contiguous; N is a power of two.
        bc: B and C side by side, (G, B, L, 2N), innermost dimension contiguous.
        d: (G, E) float32, contiguous.
        z: (B, L, E), innermost dimension contiguous, one stride between all rows; ``None`` for no gate.
        bias: (G, E) float32, contiguous.
        order, gap, delta_scale, repeats, reverse, stats: as in ``selective_scan``.
        softplus: whether bias and softplus are still to be applied to ``delta``; if not, ``bias`` is for gaps only.
        scale: factor of the result.
        saved, ungated: outputs for a backward pass, both or neither: the states before every ``SAVE_EVERY``-th
            position of a direction but the first, (G, B, (L - 1) // SAVE_EVERY, N / 4, E, 4), and the sum over
            directions before the gate, (B, L, E). Sequences are scanned whole then.

    Returns:
        y: (B, L, E).
        sums: the statistics, (G, B, L, len(stats)) float32.
    """
    directions, images, length, channels = u.shape
    check_launch(images)
    y = torch.empty_like(u[0])
    absent = y  # stands for a tensor that the kernel does not read
    z_rows = absent if z is None else rows(z)
    order = None if order is None else order.contiguous()
    factor = delta_scale if repeats is None else repeats
    gap_or_absent, factor_or_absent = (absent if t is None else t.contiguous() for t in (gap, factor))
    mask = reverse_mask(reverse)
    opposite = directions == 2 and mask in (1, 2)
    half = half_width(images, channels, u.device) if opposite and saved is None else None
    width = half or CHANNELS
    blocks = triton.cdiv(channels, width)
    sums = u.new_empty(len(stats), directions, images, length, blocks, dtype=torch.float32)
    data = u, delta, a, bc, d, bias, z_rows
    rest = gap_or_absent, factor_or_absent, y, sums, terms(stats)
    strides = z_rows.stride(1), *bc.stride()[:3]
    parts = {
        "REVERSE": mask, "GATE": z is not None, "SOFTPLUS": softplus, "GAP": gap is not None,
        "DELTA_SCALE": delta_scale is not None, "REPEATS": repeats is not None,
    }  # fmt: skip
    options = {**parts, "NP": a.shape[1], "CH": width, "num_warps": 1, **REGISTERS}
    plain = order is None and saved is None and not stats
    if plain and fits_together(directions, images, length, channels, a.shape[1], u.device):
        scan_together(*data, gap_or_absent, factor_or_absent, y, scale, parts)
    elif half is not None:
        states = u.new_empty(directions, images, a.shape[1], channels, dtype=torch.float32)
        middle = length // (2 * UNROLL_HALF) * UNROLL_HALF
        for first in (True, False):
            _scan_half[blocks, images, directions](
                *data, *rest, states, length, channels, middle, *strides, scale, FIRST=first, U=UNROLL_HALF, **options
            )
    else:
        chunk = chunk_length(length, images * blocks, u.device) if saved is None else length
        chunks = triton.cdiv(length, chunk)
        left = spans = absent
        if chunks > 1:
            left, spans = chunk_states(
                u, delta, a, bc, d, bias, order, gap, delta_scale, reverse, chunk, softplus=softplus, repeats=repeats
            )
        # With an order, a token is in a different chunk of every direction, and may be added to only after the launch
        # of the direction before.
        launches = [(g, g + 1) for g in range(directions)] if order is not None and chunks > 1 else [(0, directions)]
        for first, last in launches:
            _scan[blocks, images, chunks](
                *data, order, *rest, left, spans, saved, ungated, length, channels, chunk, *strides, scale, FROM=first,
                TO=last, G=directions, SPLIT=chunks > 1, U=UNROLL, **options,
            )  # fmt: skip
    if not stats:
        return y, sums.view(directions, images, length, 0)
    return y, sums.sum(-1).movedim(0, -1).contiguous()


def half_width(images: int, channels: int, device: torch.device) -> int | None:
    """The channels of a program of ``_scan_half``; ``None`` where scanning sequences whole or in chunks is faster.

    The load is the number of warps for each multiprocessor, at 32 channels and one direction a warp. Its limits were
    measured on an H100 at 197 tokens: chunks are faster below 1, whole sequences from 40 on. At 4 097 tokens, chunks
    are faster up to 1.4.
    """
    load = 2 * images * channels / 32 / num_sms(device)
    if load < 1 or load >= 40:
        return None
    return 16 if load < 8 else 32


@triton.jit(do_not_specialize=["length", "chunk"])
def _scan(u, delta, a, bc, d, bias, z, order, gap, factor, y, sums, terms, left, spans, saved, ungated,
          length, width: tl.constexpr, chunk, stride_z: tl.constexpr, stride_g, stride_b, stride_bc: tl.constexpr,
          scale, REVERSE: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, G: tl.constexpr, GATE: tl.constexpr,
          SOFTPLUS: tl.constexpr, GAP: tl.constexpr, DELTA_SCALE: tl.constexpr, REPEATS: tl.constexpr,
          SPLIT: tl.constexpr, NP: tl.constexpr, CH: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """Directions ``FROM`` to ``TO - 1`` of G: the whole sequence or, with ``SPLIT``, one chunk."""
    e = tl.program_id(0) * CH + tl.arange(0, CH)
    image, images = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    mask = e < width
    start = tl.program_id(2) * chunk
    end = tl.minimum(start + chunk, length)
    for g in tl.static_range(FROM, TO):
        row = g * images + image
        channels = load_channels(a + g * width * NP, d + g * width, bias + g * width, e, mask, width, SOFTPLUS, GAP,
                                 NP, CH)  # fmt: skip
        h = tl.zeros((NP, CH), tl.float32)
        if SPLIT:  # the state that the chunks before this one leave
            chunks = tl.num_programs(2)
            passed = chunks - 1 - tl.program_id(2) if (REVERSE >> g) & 1 else tl.program_id(2)
            for j in tl.range(0, passed, num_stages=STAGES):
                other = row * chunks + (chunks - 1 - j if (REVERSE >> g) & 1 else j)
                span = tl.load(spans + other * width + e, mask, 0)
                state = tl.load(tile(left + other * NP * width, e, width, NP, CH), mask[None, :], 0)
                h = tl.exp2(span[None, :] * channels.a) * h + state
        walk(h, Direction(u + row * length * width, delta + row * length * width, bc + g * stride_g + image * stride_b,
                          z + image * length * stride_z, None if order is None else order + row * length,
                          gap + (image * G + g) * length, factor + image * length, y + image * length * width,
                          sums + row * length * tl.num_programs(0), length, width, stride_z, stride_bc,
                          G * images.to(tl.int64) * length * tl.num_programs(0),
                          None if saved is None else saved + row * ((length - 1) // SAVE_EVERY) * NP * width,
                          None if ungated is None else ungated + image * length * width),
             channels, terms, start, end, scale,
             Options((REVERSE >> g) & 1, g == 0, g == G - 1, GATE, SOFTPLUS, GAP, DELTA_SCALE, REPEATS,
                     width % CH == 0),
             U)  # fmt: skip
        tl.debug_barrier()  # the next direction adds to what this one stored


@triton.jit(do_not_specialize=["length", "middle"])
def _scan_half(u, delta, a, bc, d, bias, z, gap, factor, y, sums, terms, states,
               length, width: tl.constexpr, middle, stride_z: tl.constexpr, stride_g, stride_b,
               stride_bc: tl.constexpr, scale, REVERSE: tl.constexpr, FIRST: tl.constexpr, GATE: tl.constexpr,
               SOFTPLUS: tl.constexpr, GAP: tl.constexpr, DELTA_SCALE: tl.constexpr, REPEATS: tl.constexpr,
               NP: tl.constexpr, CH: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """Two opposite directions, a program for each: to the middle with ``FIRST``, from there to the end without.

    The second launch adds to what the other direction wrote in the first.
    """
    e = tl.program_id(0) * CH + tl.arange(0, CH)
    image, images = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    mask = e < width
    for g in tl.static_range(2):
        if tl.program_id(2) == g:
            row = g * images + image
            channels = load_channels(a + g * width * NP, d + g * width, bias + g * width, e, mask, width, SOFTPLUS,
                                     GAP, NP, CH)  # fmt: skip
            state = tile(states + row * NP * width, e, width, NP, CH)
            BACKWARD: tl.constexpr = (REVERSE >> g) & 1
            h = tl.zeros((NP, CH), tl.float32) if FIRST else tl.load(state, mask[None, :], 0)
            if BACKWARD == FIRST:
                start, end = middle, length
            else:
                start, end = 0, middle
            h = walk(h, Direction(u + row * length * width, delta + row * length * width,
                                  bc + g * stride_g + image * stride_b, z + image * length * stride_z, None,
                                  gap + (image * 2 + g) * length, factor + image * length,
                                  y + image * length * width, sums + row * length * tl.num_programs(0), length, width,
                                  stride_z, stride_bc, 2 * images.to(tl.int64) * length * tl.num_programs(0), None,
                                  None),
                     channels, terms, start, end, scale,
                     Options(BACKWARD, FIRST, not FIRST, GATE, SOFTPLUS, GAP, DELTA_SCALE, REPEATS, width % CH == 0),
                     U)  # fmt: skip
            if FIRST:
                tl.store(state, h, mask[None, :])
