"""``mamba_inner_read`` for one token of each image: the output of a mixer where its two directions meet.

Row j of the L + 1 rows of an image is token j of the forward direction up to the token that is read, p, and token j - 1
of the backward direction behind it. Three launches compute the convolution, then Δ, B and C, then the sum over all rows
of what each writes into the state at p, decayed by the sum of Δ between: no recurrence, so that tokens are parallel.
For few images and up to 256 states, ``read_together`` is the last launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.formulas import LOG2E, growth, silu, softplus
from mtr_lab.ops.gpu.occupancy import on_its_device, precision, product, rows
from mtr_lab.ops.gpu.read_together import can_read_together, read_together
from mtr_lab.ops.packed import PackedWeights

TOKENS = 16  # of a program of the projections
CHANNELS, WARPS = 64, 4  # channels that it multiplies at a time
CONVOLVED = 8, 128  # tokens and channels of a program of the convolution
SUMMED = 64, 32, 4  # tokens at a time and channels of a program of the sum
FEW = 8  # images at most whose programs load more at a time and share the projections, as they wait for memory
CHANNELS_FEW, WARPS_FEW = 256, 8


@on_its_device
def mamba_inner_read(
    x: Tensor,
    z: Tensor,
    read: Tensor,
    weights: PackedWeights,
    gap: Tensor | None,
    delta_scale: Tensor | None,
    repeats: Tensor | None,
    index: Tensor | None,
    source: Tensor | None,
    scale: float,
) -> Tensor:
    """The contract of ``mtr_lab.ops.mamba_inner_read`` for S = 1, a forward and a backward direction."""
    x, read = rows(x), read.contiguous()
    images, length, channels = x.shape
    rank, states = weights.timescale.shape[1], weights.a.shape[1]
    columns = rank + 2 * states
    u = x.new_empty(images, length + 1, channels)
    delta, bc = torch.empty_like(u), x.new_empty(images, length + 1, 2 * states, dtype=torch.float32)
    y = z.new_empty(z.shape)
    factor = delta_scale if repeats is None else repeats
    absent = read  # stands for a tensor that the kernel does not read
    index_, source_, gap_, factor_ = (absent if t is None else t.contiguous() for t in (index, source, gap, factor))
    tokens, wide = CONVOLVED
    _convolve_rows[triton.cdiv(channels, wide), triton.cdiv(length + 1, tokens), images](
        x, weights.conv_weight, weights.conv_bias, read, index_, source_, u, length,
        length if source is None else source.shape[1], channels, x.stride(1), UNMERGED=source is not None,
        W=weights.conv_weight.shape[1], T=tokens, E=wide, num_warps=4,
    )  # fmt: skip
    wide, warps = (CHANNELS_FEW, WARPS_FEW) if images <= FEW else (CHANNELS, WARPS)
    shared = triton.cdiv(channels, wide) if images <= FEW else 1
    _project_rows[triton.cdiv(length + 1, TOKENS) + 1, images, shared](
        u, weights.projection, weights.timescale, weights.timescale_bias, read, delta, bc, length, channels, columns,
        R=rank, N=states, PARTS=shared, PRECISION=precision(x.dtype), T=TOKENS, E=wide, num_warps=warps,
    )  # fmt: skip
    data = u, delta, bc, weights.a, weights.d, weights.timescale_bias, z.contiguous(), read, gap_, factor_, y
    parts = {"GAP": gap is not None, "DELTA_SCALE": delta_scale is not None, "REPEATS": repeats is not None}
    if images <= FEW and can_read_together(states):
        read_together(*data, scale, parts)
        return y
    tokens, few, warps = SUMMED
    _sum_rows[triton.cdiv(channels, few), images](
        *data, length, channels, scale, N=states, T=tokens, E=few, num_warps=warps, **parts
    )
    return y


@triton.jit(do_not_specialize=["length", "positions"])
def _convolve_rows(x, weight, bias, read, index, source, u, length, positions, channels: tl.constexpr,
                   step_x: tl.constexpr, UNMERGED: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
                   E: tl.constexpr):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * T + tl.arange(0, T)
    e = tl.program_id(0) * E + tl.arange(0, E)
    row_mask, channel_mask = row <= length, e < channels
    mask = row_mask[:, None] & channel_mask[None, :]
    backward = (row > tl.load(read + image)).to(tl.int32)
    position = row - backward
    if UNMERGED:
        position = tl.load(index + image * length + position, row_mask, 0).to(tl.int32)
    total = tl.load(bias + backward[:, None] * channels + e[None, :], mask, 0)
    x += image * length * step_x
    for k in tl.static_range(W):  # tap W - 1 multiplies the token itself
        near = position + (2 * backward - 1) * (W - 1 - k)
        exists = row_mask & (near >= 0) & (near < positions)
        token = near
        if UNMERGED:
            token = tl.load(source + image * positions + near, exists, -1).to(tl.int32)
            exists = token >= 0
        x_k = tl.load(x + token[:, None] * step_x + e[None, :], exists[:, None] & channel_mask[None, :], 0)
        tap = tl.load(weight + (backward * W + k)[:, None] * channels + e[None, :], mask, 0)
        total += tap * x_k.to(tl.float32)
    active = silu(total)
    at = u + (image * (length + 1) + row[:, None]) * channels + e[None, :]
    tl.store(at, active.to(u.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["length"])
def _project_rows(u, projection, timescale, bias, read, delta, bc, length, channels: tl.constexpr,
                  columns: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
                  PRECISION: tl.constexpr, T: tl.constexpr, E: tl.constexpr):  # fmt: skip
    """T rows of one direction: the tiles of the backward direction follow those of the forward one.

    One of ``PARTS`` programs that share the channels of Δ. Each multiplies all channels by x_proj.
    """
    image, tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    forward_rows = tl.load(read + image).to(tl.int32) + 1
    forward_tiles = tl.cdiv(forward_rows, T)
    g = (tile >= forward_tiles).to(tl.int32)
    start = tl.where(g == 1, forward_rows + (tile - forward_tiles) * T, tile * T)
    row = start + tl.arange(0, T)
    row_mask = row < tl.where(g == 1, length + 1, forward_rows)
    at = image * (length + 1) + row
    r, n = tl.arange(0, R), tl.arange(0, 2 * N)
    rank, states = tl.zeros((T, R), tl.float32), tl.zeros((T, 2 * N), tl.float32)
    for e0 in range(0, channels, E):
        e = e0 + tl.arange(0, E)
        mask = e < channels
        u_e = tl.load(u + at[:, None] * channels + e[None, :], row_mask[:, None] & mask[None, :], 0)
        w = projection + (g * channels + e)[:, None] * columns
        rank = product(u_e, tl.load(w + r[None, :], mask[:, None], 0), rank, PRECISION)
        states = product(u_e, tl.load(w + R + n[None, :], mask[:, None], 0), states, PRECISION)
    tl.store(bc + at[:, None] * (2 * N) + n[None, :], states, row_mask[:, None] & (tl.program_id(2) == 0))
    low = rank.to(timescale.dtype.element_ty)
    for e0 in range(tl.program_id(2) * E, channels, PARTS * E):
        e = e0 + tl.arange(0, E)
        mask = e < channels
        w = tl.load(timescale + (g * R + r)[:, None] * channels + e[None, :], mask[None, :], 0)
        dt = product(low, w, tl.zeros((T, E), tl.float32), PRECISION)
        dt = softplus(dt + tl.load(bias + g * channels + e, mask, 0)[None, :])
        out = delta + at[:, None] * channels + e[None, :]
        tl.store(out, dt.to(delta.dtype.element_ty), row_mask[:, None] & mask[None, :])


@triton.jit(do_not_specialize=["length"])
def _sum_rows(u, delta, bc, a, d, bias, z, read, gap, factor, y, length, channels: tl.constexpr, scale,
              GAP: tl.constexpr, DELTA_SCALE: tl.constexpr, REPEATS: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
              E: tl.constexpr):  # fmt: skip
    """Each direction from the token that is read outwards, T rows at a time."""
    image = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * E + tl.arange(0, E)
    channel_mask = e < channels
    p = tl.load(read + image).to(tl.int32)
    first = image * (length + 1)
    out = tl.zeros((E,), tl.float32)
    for g in tl.static_range(2):
        count = length - p if g == 1 else p + 1
        own = first + p + g  # the row of the token that is read
        span = tl.zeros((E,), tl.float32)  # the sum of Δ between the next row and the token that is read
        idle = softplus(tl.load(bias + g * channels + e, channel_mask, 0))
        for k0 in range(0, count, T):
            k = k0 + tl.arange(0, T)
            row_mask = k < count
            at = own + k if g == 1 else own - k
            token = p + k if g == 1 else p - k
            mask = row_mask[:, None] & channel_mask[None, :]
            dt = tl.load(delta + at[:, None] * channels + e[None, :], mask, 0).to(tl.float32)
            times = tl.zeros((T,), tl.float32) + 1
            if DELTA_SCALE or REPEATS:
                times = tl.load(factor + image * length + token, row_mask, 1).to(tl.float32)
            if DELTA_SCALE:
                dt *= times[:, None]
            write = dt * tl.load(u + at[:, None] * channels + e[None, :], mask, 0).to(tl.float32)
            past = dt * times[:, None] if REPEATS else dt
            if GAP:
                step = length - 1 - token if g == 1 else token
                missing = tl.load(gap + (image * 2 + g) * length + step, row_mask, 0).to(tl.float32)
                past += missing[:, None] * idle[None, :]
            between = span[None, :] + tl.cumsum(past, 0) - past
            seen = tl.zeros((T, E), tl.float32)
            for n in range(N):
                a_n = tl.load(a + (g * N + n) * channels + e, channel_mask, 0) * LOG2E
                b_n = tl.load(bc + at * (2 * N) + n, row_mask, 0) * tl.load(bc + own * (2 * N) + N + n)
                fade = tl.exp2(between * a_n[None, :])
                if REPEATS:
                    fade *= growth(dt * a_n[None, :], times[:, None])
                seen += fade * b_n[:, None]
            out += tl.sum(write * seen, 0)
            span += tl.sum(past, 0)
        skip = tl.load(d + g * channels + e, channel_mask, 0)
        out += skip * tl.load(u + own * channels + e, channel_mask, 0).to(tl.float32)
    z_e = tl.load(z + image * channels + e, channel_mask, 0).to(tl.float32)
    out *= scale * silu(z_e)
    tl.store(y + image * channels + e, out.to(y.dtype.element_ty), channel_mask)
