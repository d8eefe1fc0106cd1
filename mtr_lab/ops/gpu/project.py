"""Everything a block's scan reads, in one Triton kernel: convolution, SiLU, x_proj, dt_proj and softplus.

A program owns a run of tokens and one direction. It walks through the channels three times: it convolves them, it
multiplies them into the low rank, B and C, and it multiplies the low rank out into Δ. What one walk stores the next
finds in the cache, so that memory sees x once, and u and Δ once each on their way to the scan.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.launch import autotuned, precision, product, reverse_mask, rows
from mtr_lab.ops.gpu.scan import LOG2E, softplus
from mtr_lab.ops.mamba_inner import Layout

CONFIGS = [
    triton.Config({"T": tokens, "EK": channels}, num_warps=warps, num_stages=stages)
    for tokens, channels, warps, stages in (
        (64, 32, 4, 2),
        (64, 64, 4, 2),
        (32, 64, 4, 2),
        (128, 32, 8, 2),
        (16, 64, 2, 2),
    )
]


@autotuned(CONFIGS, key=["channels", "R", "N2", "G", "SMALL"])
@triton.jit(do_not_specialize=["tokens", "length"])
def _project(x, conv_weight, conv_bias, low_rank, input_output, timescale, timescale_bias, stretch, u, delta, bc, sums,
             tokens, length, channels, step_x, reverse,
             W: tl.constexpr, R: tl.constexpr, N2: tl.constexpr, G: tl.constexpr, STRETCH: tl.constexpr,
             SUMS: tl.constexpr, SMALL: tl.constexpr, PRECISION: tl.constexpr, T: tl.constexpr,
             EK: tl.constexpr):  # fmt: skip
    g = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * T
    row = tl.arange(0, T)
    inside = first + row < tokens
    t = ((first + row) % length).to(tl.int32)
    sign = 1 - 2 * ((reverse >> g) & 1)
    x += first * step_x
    at = g * tokens.to(tl.int64) + first
    u += at * channels
    delta += at * channels
    ek = tl.arange(0, EK)
    r = tl.arange(0, R)
    n = tl.arange(0, N2)
    ranks = tl.zeros((T, R), tl.float32)
    ins_outs = tl.zeros((T, N2), tl.float32)
    for e0 in range(0, channels, EK):
        e = e0 + ek
        there = e < channels
        ge = g * channels + e
        total = tl.zeros((T, EK), tl.float32) + tl.load(conv_bias + ge, there, 0)[None, :]
        for k in tl.static_range(W):
            shift = sign * (W - 1 - k)
            near = inside & (t - shift >= 0) & (t - shift < length)
            x_k = tl.load(x + (row - shift)[:, None] * step_x + e[None, :], near[:, None] & there[None, :], 0)
            total += x_k.to(tl.float32) * tl.load(conv_weight + (g * W + k) * channels + e, there, 0)[None, :]
        active = total / (1 + tl.exp2(-total * LOG2E))
        both = inside[:, None] & there[None, :]
        tl.store(u + row[:, None] * channels + e[None, :], active.to(u.dtype.element_ty), both)
    tl.debug_barrier()  # u is read back, from the cache, by other threads than stored it
    for e0 in range(0, channels, EK):
        e = e0 + ek
        there = e < channels
        ge = g * channels + e
        active = tl.load(u + row[:, None] * channels + e[None, :], inside[:, None] & there[None, :], 0)
        weight = tl.load(low_rank + ge[:, None] * R + r[None, :], there[:, None], 0)
        ranks = product(active, weight, ranks, PRECISION)
        weight = tl.load(input_output + ge[:, None] * N2 + n[None, :], there[:, None], 0)
        ins_outs = product(active, weight, ins_outs, PRECISION)
    tl.store(bc + (at + row)[:, None] * N2 + n[None, :], ins_outs, inside[:, None])
    rank = ranks.to(u.dtype.element_ty)
    taken = tl.zeros((T,), tl.float32)
    written = tl.zeros((T,), tl.float32)
    for e0 in range(0, channels, EK):
        e = e0 + ek
        there = e < channels
        ge = g * channels + e
        weight = tl.load(timescale + g * R * channels + r[:, None] * channels + e[None, :], there[None, :], 0)
        bias = tl.zeros((T, EK), tl.float32) + tl.load(timescale_bias + ge, there, 0)[None, :]
        dt = softplus(product(rank, weight, bias, PRECISION))
        if STRETCH:
            dt *= tl.load(stretch + first + row, inside, 0)[:, None]
        both = inside[:, None] & there[None, :]
        tl.store(delta + row[:, None] * channels + e[None, :], dt.to(delta.dtype.element_ty), both)
        if SUMS:
            dt = tl.where(both, dt, 0)
            write = dt * tl.load(u + row[:, None] * channels + e[None, :], both, 0).to(tl.float32)
            taken += tl.sum(dt, 1)
            written += tl.sum(write * write, 1)
    if SUMS:
        tl.store(sums + (at + row) * 3, taken, inside)
        tl.store(sums + (at + row) * 3 + 1, written, inside)


def project(
    x: Tensor, layout: Layout, stretch: Tensor | None, reverse: Sequence[bool], with_stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Convolve the tokens and project what the scan needs.

    Args:
        x: (B, L, E), rows evenly spaced.
        stretch: (B, L), what Δ of each token is multiplied by.

    Returns:
        u and Δ, after its softplus, (G, B, L, E) in the dtype of ``x``; B and C side by side, (G, B, L, 2N) float32;
        Σ Δ and Σ (Δ u)² over the channels in the first two columns of (G, B, L, 3) float32 if asked for, else
        (G, B, L, 0).
    """
    x = rows(x)
    images, length, channels = x.shape
    directions, width, _ = layout.conv_weight.shape
    rank, states2 = layout.low_rank.shape[2], layout.input_output.shape[2]
    u, delta = (x.new_empty(directions, images, length, channels) for _ in range(2))
    bc = x.new_empty(directions, images, length, states2, dtype=torch.float32)
    sums = x.new_empty(directions, images, length, 3 * with_stats, dtype=torch.float32)
    tokens = images * length
    _project[lambda meta: (triton.cdiv(tokens, meta["T"]), directions)](
        x, layout.conv_weight, layout.conv_bias, layout.low_rank, layout.input_output, layout.timescale,
        layout.timescale_bias, x if stretch is None else stretch.contiguous(), u, delta, bc, sums if with_stats else bc,
        tokens, length, channels, x.stride(1), reverse_mask(reverse), W=width, R=rank, N2=states2, G=directions,
        STRETCH=stretch is not None, SUMS=with_stats, SMALL=tokens < 4096,
        PRECISION=precision(x.dtype),
    )  # fmt: skip
    return u, delta, bc, sums
