"""Convolution, x_proj and dt_proj of few tokens in one launch, where three launches would wait for memory three times.

A program computes some tokens of one direction. Programs that share tokens compute all of their convolution and x_proj,
and each writes some channels.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.formulas import LOG2E, maximum, softplus, terms
from mtr_lab.ops.gpu.occupancy import num_sms, precision, product, reverse_mask
from mtr_lab.ops.packed import PackedWeights

TOKENS, CHANNELS, WARPS = 16, 256, 8  # of a program: tokens, channels at a time, warps
MAX_TOKENS = 1024  # of all images; with more, three launches are faster


def project_few(
    x: Tensor,
    weights: PackedWeights,
    delta_scale: Tensor | None,
    reverse: Sequence[int],
    stats: Sequence[str],
    repeats: Tensor | None,
    index: Tensor | None,
    source: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The contract of ``project.project``, for x (B, L, E) of contiguous, evenly spaced rows."""
    images, length, channels = x.shape
    directions, width, _ = weights.conv_weight.shape
    states = weights.a.shape[1]
    u = x.new_empty(directions, images, length, channels)
    delta = torch.empty_like(u)
    projected = x.new_empty(directions, images, length, weights.projection.shape[2], dtype=torch.float32)
    tiles = triton.cdiv(length, TOKENS)
    room = 2 * num_sms(x.device) // max(tiles * images * directions, 1)
    parts = max(1, min(room, triton.cdiv(channels, CHANNELS)))
    sums = x.new_empty(parts, directions, images, length, len(stats), dtype=torch.float32)
    absent = x  # stands for a tensor that the kernel does not read
    factor = delta_scale if repeats is None else repeats
    unmerged = index is not None and source is not None
    positions = [t.contiguous() for t in (index, source) if t is not None] if unmerged else [absent, absent]
    _project_few[tiles, images, directions * parts](
        x, weights.conv_weight, weights.conv_bias, weights.projection, weights.timescale, weights.timescale_bias,
        *positions, absent if factor is None else factor.contiguous(), u, delta, projected, sums, terms(stats), length,
        positions[1].shape[1], channels, x.stride(1), REVERSE=reverse_mask(reverse), W=width,
        R=weights.timescale.shape[1], N=states, PARTS=parts, UNMERGED=unmerged, DELTA_SCALE=delta_scale is not None,
        REPEATS=repeats is not None, PRECISION=precision(x.dtype), T=TOKENS, E=CHANNELS, num_warps=WARPS,
    )  # fmt: skip
    return u, delta, projected, sums[0] if parts == 1 or not stats else sums.sum(0)


@triton.jit(do_not_specialize=["length", "positions"])
def _project_few(x, conv_weight, conv_bias, projection, timescale, bias, index, source, factor, u, delta, projected,
                 sums, terms, length, positions, channels: tl.constexpr, step_x: tl.constexpr, REVERSE: tl.constexpr,
                 W: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, UNMERGED: tl.constexpr,
                 DELTA_SCALE: tl.constexpr, REPEATS: tl.constexpr, PRECISION: tl.constexpr, T: tl.constexpr,
                 E: tl.constexpr):  # fmt: skip
    """T tokens of one direction of an image; this program writes every ``PARTS``-th group of E channels."""
    image, images = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    g, part = tl.program_id(2) // PARTS, tl.program_id(2) % PARTS
    step = 1 - 2 * ((REVERSE >> g) & 1)
    t = tl.program_id(0) * T + tl.arange(0, T)
    is_token = t < length
    position = t
    if UNMERGED:
        position = tl.load(index + image * length + t, is_token, 0).to(tl.int32)
    x += image * length * step_x
    at = (g * images + image) * length + t
    r, n = tl.arange(0, R), tl.arange(0, 2 * N)
    rank, states = tl.zeros((T, R), tl.float32), tl.zeros((T, 2 * N), tl.float32)
    for e0 in range(0, channels, E):
        e = e0 + tl.arange(0, E)
        mask = e < channels
        active = tl.zeros((T, E), tl.float32) + tl.load(conv_bias + g * channels + e, mask, 0).to(tl.float32)[None, :]
        for k in tl.static_range(W):  # tap W - 1 multiplies the token itself
            token = position - step * (W - 1 - k)
            exists = is_token & (token >= 0) & (token < positions)
            if UNMERGED:
                token = tl.load(source + image * positions + token, exists, -1).to(tl.int32)
                exists = token >= 0
            x_k = tl.load(x + token[:, None] * step_x + e[None, :], exists[:, None] & mask[None, :], 0)
            tap = tl.load(conv_weight + (g * W + k) * channels + e, mask, 0)
            active += tap.to(tl.float32)[None, :] * x_k.to(tl.float32)
        active = (active / (1 + tl.exp2(-active * LOG2E))).to(u.dtype.element_ty)
        written = is_token[:, None] & (mask & (e0 // E % PARTS == part))[None, :]
        tl.store(u + at[:, None] * channels + e[None, :], active, written)
        w = projection + (g * channels + e)[:, None] * (R + 2 * N)
        rank = product(active, tl.load(w + r[None, :], mask[:, None], 0), rank, PRECISION)
        states = product(active, tl.load(w + R + n[None, :], mask[:, None], 0), states, PRECISION)
    out = projected + at[:, None] * (R + 2 * N)
    tl.store(out + r[None, :], rank, is_token[:, None] & (part == 0))
    tl.store(out + R + n[None, :], states, is_token[:, None] & (part == 0))
    low = rank.to(timescale.dtype.element_ty)
    totals = ()
    for _ in tl.static_range(len(terms)):
        totals = totals + (tl.zeros((T,), tl.float32),)
    if len(terms) > 0:
        tl.debug_barrier()  # statistics read u
    for e0 in range(part * E, channels, PARTS * E):
        e = e0 + tl.arange(0, E)
        mask = is_token[:, None] & (e < channels)[None, :]
        w = tl.load(timescale + (g * R + r)[:, None] * channels + e[None, :], (e < channels)[None, :], 0)
        dt = product(low, w, tl.zeros((T, E), tl.float32), PRECISION)
        dt = softplus(dt + tl.load(bias + g * channels + e, e < channels, 0)[None, :])
        if DELTA_SCALE:
            dt *= tl.load(factor + image * length + t, is_token, 0)[:, None]
        tl.store(delta + at[:, None] * channels + e[None, :], dt.to(delta.dtype.element_ty), mask)
        if REPEATS:  # statistics see Δ of all equal tokens
            dt *= tl.load(factor + image * length + t, is_token, 0)[:, None]
        dt = tl.where(mask, dt, 0)
        u_e = dt
        if len(terms) > 0:
            u_e = tl.load(u + at[:, None] * channels + e[None, :], mask, 0).to(tl.float32)
        more = ()
        for i in tl.static_range(len(terms)):
            more = more + (totals[i] + tl.sum(terms[i](dt, u_e, None, maximum), 1),)
        totals = more
    place = sums + (part * (tl.num_programs(2) // PARTS) * images * length + at) * len(terms)
    for i in tl.static_range(len(terms)):
        tl.store(place + i, totals[i], is_token)
