"""The inputs of a block's scan: convolution and SiLU, then x_proj, then dt_proj with bias and softplus.

Of large batches, convolution and x_proj are one launch: ``conv_window`` for neighbouring tokens, ``conv_project`` for
those over original positions.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu import conv_project, conv_window
from mtr_lab.ops.gpu.conv_unmerged import convolve as convolve_unmerged
from mtr_lab.ops.gpu.formulas import maximum, silu, softplus, terms
from mtr_lab.ops.gpu.occupancy import autotuned, num_sms, on_its_device, precision, product, reverse_mask, rows
from mtr_lab.ops.packed import PackedWeights

SMALL = 4096  # tokens: with fewer, runs are ``UNROLL`` long, so that enough programs run to fill a GPU
RUN = 32  # tokens that a program convolves one after the other
UNROLL = 4
TILE = 64  # channels whose timescales a program computes at a time


def _tiles(*shapes: tuple[int, int, int]) -> list[triton.Config]:
    return [triton.Config({"T": tokens, "E": channels}, num_warps=warps) for tokens, channels, warps in shapes]


@autotuned([triton.Config({"E": channels}, num_warps=1) for channels in (128, 64)], key=["channels", "G"])
@triton.jit(do_not_specialize=["length", "run"])
def _convolve(x, weight, bias, u, length, run, channels: tl.constexpr, step_x: tl.constexpr, REVERSE: tl.constexpr,
              G: tl.constexpr, W: tl.constexpr, E: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """A program, one warp, slides a window along a run of tokens, so that each token is loaded once for all taps."""
    runs = tl.cdiv(length, run)
    image = (tl.program_id(1) // runs).to(tl.int64)
    start = tl.program_id(1) % runs * run
    end = tl.minimum(start + run, length)
    e = tl.program_id(0) * E + tl.arange(0, E)
    mask = e < channels
    weights, biases = (), ()
    for g in tl.static_range(G):
        biases = biases + (tl.load(bias + g * channels + e, mask, 0),)
        for k in tl.static_range(W):
            weights = weights + (tl.load(weight + (g * W + k) * channels + e, mask, 0),)
    x += image * length * step_x + e
    u += image * length * channels + e
    size = tl.num_programs(1).to(tl.int64) // runs * length * channels
    window = ()  # tokens t - W + 1 to t + W - 2 + U, where t is the next token
    for k in tl.static_range(2 * W - 2 + U):
        t = start + k - W + 1
        window = window + (tl.load(x + t * step_x, mask & (t >= 0) & (t < length), 0),)
    for t0 in range(start, end, U):
        for k in tl.static_range(U):
            t = t0 + U + k + W - 1
            window = window + (tl.load(x + t * step_x, mask & (t < length), 0),)
        for k in tl.static_range(U):
            for g in tl.static_range(G):
                total = biases[g]
                for tap in tl.static_range(W):  # tap W - 1 multiplies the token itself
                    near = window[k + (2 * W - 2 - tap if (REVERSE >> g) & 1 else tap)]
                    total += weights[g * W + tap] * near.to(tl.float32)
                active = silu(total)
                tl.store(u + g * size + (t0 + k) * channels, active.to(u.dtype.element_ty), mask & (t0 + k < end))
        window = window[U:]


@autotuned(
    _tiles((64, TILE, 4), (32, TILE, 4)),
    key=["channels", "R", "G", "BLOCKS", "STATS"],
)
@triton.jit(do_not_specialize=["tokens"])
def _timescales(projected, weight, bias, factor, u, delta, sums, terms, tokens, channels: tl.constexpr,
                step: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BLOCKS: tl.constexpr, DELTA_SCALE: tl.constexpr,
                REPEATS: tl.constexpr, STATS: tl.constexpr, PRECISION: tl.constexpr, T: tl.constexpr,
                E: tl.constexpr):  # fmt: skip
    """Δ of T tokens, and their statistics. ``STATS``, the names of the terms, is a key of the tuner."""
    g = tl.program_id(2)
    first = tl.program_id(0).to(tl.int64) * T
    row = tl.arange(0, T)
    row_mask = first + row < tokens
    at = g * tokens.to(tl.int64) + first + row
    r = tl.arange(0, R)
    rank = tl.load(projected + at[:, None] * step + r[None, :], row_mask[:, None], 0).to(weight.dtype.element_ty)
    totals = ()
    for _ in tl.static_range(len(terms)):
        totals = totals + (tl.zeros((T,), tl.float32),)
    SHARE: tl.constexpr = (channels + BLOCKS * E - 1) // (BLOCKS * E) * E
    for e0 in range(0, SHARE, E):
        e = tl.program_id(1) * SHARE + e0 + tl.arange(0, E)
        channel_mask = e < channels
        w = tl.load(weight + (g * R + r)[:, None] * channels + e[None, :], channel_mask[None, :], 0)
        dt = product(rank, w, tl.zeros((T, E), tl.float32), PRECISION)
        dt = softplus(dt + tl.load(bias + g * channels + e, channel_mask, 0)[None, :])
        if DELTA_SCALE:
            dt *= tl.load(factor + first + row, row_mask, 0)[:, None]
        mask = row_mask[:, None] & channel_mask[None, :]
        tl.store(delta + at[:, None] * channels + e[None, :], dt.to(delta.dtype.element_ty), mask)
        if REPEATS:  # statistics see Δ of all equal tokens
            dt *= tl.load(factor + first + row, row_mask, 0)[:, None]
        if channels % (BLOCKS * E) != 0:
            dt = tl.where(channel_mask[None, :], dt, 0)
        u_e = dt
        if len(terms) > 0:  # the compiler removes the load if no term uses u
            u_e = tl.load(u + at[:, None] * channels + e[None, :], mask, 0).to(tl.float32)
        more = ()
        for i in tl.static_range(len(terms)):
            more = more + (totals[i] + tl.sum(terms[i](dt, u_e, None, maximum), 1),)
        totals = more
    place = sums + (tl.program_id(1) * G * tokens.to(tl.int64) + at) * len(terms)
    for i in tl.static_range(len(terms)):
        tl.store(place + i, totals[i], row_mask)


@on_its_device
def project(
    x: Tensor,
    weights: PackedWeights,
    delta_scale: Tensor | None,
    reverse: Sequence[int],
    stats: Sequence[str],
    *,
    repeats: Tensor | None = None,
    index: Tensor | None = None,
    source: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Convolve the tokens and project them to Δ, B and C.

    Args:
        x: (B, L, E), copied unless its rows are contiguous and evenly spaced.
        delta_scale: (B, L), a factor on Δ of each token.
        stats: the statistics to compute, of those that do not read the scan's output.
        repeats, index, source: as in ``mtr_lab.ops.mamba_inner``.

    Returns:
        u: (G, B, L, E) in the dtype of ``x``.
        delta: Δ after softplus, likewise.
        projected: low rank, B and C side by side, (G, B, L, R + 2N) float32.
        sums: the statistics, (G, B, L, len(stats)) float32.
    """
    u, projected = _convolve_and_multiply(x, weights, reverse, index, source)
    directions, images, length, channels = u.shape
    rank, tokens = weights.timescale.shape[1], images * length
    delta = torch.empty_like(u)
    blocks = channel_blocks(directions * tokens, channels, x.device)
    parts = x.new_empty(blocks, directions, images, length, len(stats), dtype=torch.float32)
    factor = delta_scale if repeats is None else repeats
    _timescales[lambda meta: (triton.cdiv(tokens, meta["T"]), blocks, directions)](
        projected, weights.timescale, weights.timescale_bias, x if factor is None else factor.contiguous(), u,
        delta, parts, terms(stats), tokens, channels, projected.shape[3], R=rank, G=directions, BLOCKS=blocks,
        DELTA_SCALE=delta_scale is not None, REPEATS=repeats is not None, STATS=" ".join(stats),
        PRECISION=precision(x.dtype),
    )  # fmt: skip
    return u, delta, projected, parts[0] if blocks == 1 or not stats else parts.sum(0)


def _convolve_and_multiply(
    x: Tensor, weights: PackedWeights, reverse: Sequence[int], index: Tensor | None, source: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``u`` and ``projected`` of ``project``."""
    images, length, channels = x.shape
    directions, width, _ = weights.conv_weight.shape
    tokens = images * length
    if index is not None and source is not None:
        if conv_project.fits(tokens, channels, x.dtype):
            return conv_project.convolve_project(x, weights, reverse, index, source)
        u = convolve_unmerged(x, weights.conv_weight, weights.conv_bias, index, source, reverse)
    elif conv_window.fits(tokens, channels, x.dtype):
        return conv_window.convolve_window(x, weights, reverse)
    else:
        x = rows(x)
        u = x.new_empty(directions, images, length, channels)
        run = triton.cdiv(length, triton.cdiv(length, RUN)) if tokens >= SMALL else UNROLL
        _convolve[lambda meta: (triton.cdiv(channels, meta["E"]), images * triton.cdiv(length, run))](
            x, weights.conv_weight, weights.conv_bias, u, length, run, channels, x.stride(1),
            REVERSE=reverse_mask(reverse), G=directions, W=width, U=UNROLL,
        )  # fmt: skip
    return u, _multiply(u.flatten(1, 2), weights.projection).unflatten(1, (images, length))


def channel_blocks(tokens: int, channels: int, device: torch.device) -> int:
    """The number of programs that share the channels of a token, so that few tokens still fill the GPU.

    The aim is six programs a multiprocessor; at most eight share a token, and each takes the same number of tiles.
    """
    tiles = triton.cdiv(channels, TILE)
    wanted = 6 * num_sms(device) // triton.cdiv(max(tokens, 1), 64)
    return triton.cdiv(tiles, triton.cdiv(tiles, max(1, min(wanted, 8, tiles))))


def _multiply(u: Tensor, weight: Tensor) -> Tensor:
    """(G, T, E) @ (G, E, K) in float32."""
    if u.is_cuda and u.dtype != torch.float32:
        return torch.bmm(u, weight, out_dtype=torch.float32)
    return torch.bmm(u.float(), weight.float())
