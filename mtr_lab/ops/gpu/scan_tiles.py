"""The selective scan with few states and a low-rank Δ, in parallel over the tokens of a tile.

With one state a channel, a step of the recurrence is too little work for a program that walks from token to token. Here
a program is one warp, with some channels of one image on one path. It reads a tile of tokens in the order of the path,
multiplies their low-rank Δ by the projection, and scans the tile; the state goes on to the next tile. Each thread has a
channel, so that a scan needs no exchange between threads. The outputs of the paths are stored apart, and added and
normalised by a second kernel.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.add_paths import add_paths
from mtr_lab.ops.gpu.formulas import LOG2E, growth, maximum, softplus, terms
from mtr_lab.ops.gpu.occupancy import check_launch, on_its_device, precision, product, registers

TOKENS, CHANNELS = 8, 32  # of a tile
REGISTERS = registers(128)


@on_its_device
def scan(
    u: Tensor,
    low_rank: Tensor,
    timescale: Tensor,
    a: Tensor,
    d: Tensor,
    bias: Tensor,
    order: Tensor,
    gap: Tensor | None,
    factor: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float,
    repeats: bool,
    stats: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """The result of ``mtr_lab.ops.scan_low_rank`` for float32, float16 or bfloat16 data, accumulated in float32.

    Args:
        u: (B, L, E), contiguous.
        low_rank: Δ before its projection, B and C side by side, (G, B, L, R + 2N), innermost dimension contiguous.
        timescale: (G, E, R), contiguous, in the dtype of ``low_rank``.
        a: (G, E, N) float32, contiguous.
        d, bias: (G, E) float32, contiguous.
        order: (G, B, L) int64, innermost dimension contiguous; images may share rows.
        gap: (B, G, L), contiguous.
        factor: (B, L) float32, contiguous: of Δ, or with ``repeats`` the number of equal tokens.
        norm_weight, norm_bias: (E,), of a LayerNorm of the sum over the paths; ``None`` for no norm.
        stats: as in ``selective_scan``.

    Returns:
        y: (B, L, E).
        sums: the statistics, (G, B, L, len(stats)) float32.
    """
    images, length, channels = u.shape
    check_launch(images)
    directions, _, rank = timescale.shape
    blocks = triton.cdiv(channels, CHANNELS)
    outputs = u.new_empty(directions, *u.shape)
    sums = u.new_empty(len(stats), directions, images, length, blocks, dtype=torch.float32)
    _scan_tiles[blocks, images, directions](
        u, low_rank, timescale, a, d, bias, order, gap, factor, outputs, sums, terms(stats), length, channels,
        *low_rank.stride()[:3], *order.stride()[:2], R=rank, RP=max(16, triton.next_power_of_2(rank)), N=a.shape[2],
        REPEATS=repeats, PRECISION=precision(low_rank.dtype), T=TOKENS, CH=CHANNELS, EVEN=channels % CHANNELS == 0,
        num_warps=1, **REGISTERS,
    )  # fmt: skip
    sums = sums.sum(-1).movedim(0, -1).contiguous() if stats else sums.view(directions, images, length, 0)
    return add_paths(outputs, None, norm_weight, norm_bias, eps), sums


@triton.jit
def _then(fade, update, next_fade, next_update):
    """Two steps of a recurrence as one."""
    return fade * next_fade, next_fade * update + next_update


@triton.jit
def _tokens(order, s0, length, T: tl.constexpr):
    """The tokens at T steps of a path; beyond its end the last one."""
    return tl.load(order + tl.minimum(s0 + tl.arange(0, T), length - 1)).to(tl.int32)


@triton.jit
def _inputs(u, low, t, r, channels: tl.constexpr, stride_t: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """Low-rank Δ (T, RP), input (T, CH), B and C (N times (T,) each) of the tokens ``t``."""
    b = ()
    c = ()
    for n in tl.static_range(N):
        b = b + (tl.load(low + t * stride_t + R + n),)
        c = c + (tl.load(low + t * stride_t + R + N + n),)
    return tl.load(low + t[:, None] * stride_t + r[None, :]), tl.load(u + t[:, None] * channels), b, c


@triton.jit(do_not_specialize=["length"])
def _scan_tiles(u, low_rank, timescale, a, d, bias, order, gap, factor, outputs, sums, terms, length,
                channels: tl.constexpr, stride_g, stride_b, stride_t: tl.constexpr, order_g, order_b,
                R: tl.constexpr, RP: tl.constexpr, N: tl.constexpr, REPEATS: tl.constexpr, PRECISION: tl.constexpr,
                T: tl.constexpr, CH: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    e, r = tl.program_id(0) * CH + tl.arange(0, CH), tl.arange(0, RP)
    image, images, g = tl.program_id(1).to(tl.int64), tl.num_programs(1), tl.program_id(2)
    here = e < channels
    parameters = g * channels + e
    weight = tl.load(timescale + parameters[None, :] * R + r[:, None], here[None, :] & (r < R)[:, None], 0)  # (RP, CH)
    bias_e = tl.load(bias + parameters, here, 0)[None, :]
    d_e = tl.load(d + parameters, here, 0)[None, :]
    states = ()
    decays = ()
    for n in tl.static_range(N):
        states = states + (tl.zeros((1, CH), tl.float32),)
        decays = decays + ((tl.load(a + parameters * N + n, here, 0) * LOG2E)[None, :],)
    # Beyond the last channel and low-rank value, the last one is read: its weight is 0, its output is not stored.
    near, r = tl.max_contiguous(tl.minimum(e, channels - 1), 1), tl.minimum(r, R - 1)
    e = tl.max_contiguous(e, 1)  # the compiler then gives every thread one channel
    row = g * images + image
    low = low_rank + g * stride_g + image * stride_b
    order += g * order_g + image * order_b
    u += image * length * channels + near[None, :]
    outputs += row * length * channels + e[None, :]
    last = (tl.arange(0, T) == T - 1)[:, None]
    t = _tokens(order, 0, length, T)
    t_next = _tokens(order, T, length, T)
    low_t, u_now, bs, cs = _inputs(u, low, t, r, channels, stride_t, R, N)
    for s0 in range(0, length, T):  # the next tile's inputs are loaded while this one is scanned
        t_after = _tokens(order, s0 + 2 * T, length, T)
        low_next, u_next, b_next, c_next = _inputs(u, low, t_next, r, channels, stride_t, R, N)
        s = s0 + tl.arange(0, T)
        exists = s < length
        mask = exists[:, None]
        if not EVEN:
            mask &= here[None, :]
        delta = product(low_t, weight, tl.zeros((T, CH), tl.float32), PRECISION)
        dt = softplus(delta + bias_e)
        u_t = u_now.to(tl.float32)
        one, times = dt, dt
        if factor is not None:
            times = tl.load(factor + image * length + t)[:, None]
            dt *= times
            if not REPEATS:
                one = dt
        write, span = one * u_t, dt
        if gap is not None:
            missing = tl.load(gap + (image * tl.num_programs(2) + g) * length + s, exists, 0).to(tl.float32)
            span += missing[:, None] * softplus(bias_e)
        y_t = d_e * u_t
        after = ()
        for n in tl.static_range(N):
            update = write * bs[n].to(tl.float32)[:, None]
            if REPEATS:
                update *= growth(one * decays[n], times)
            fade, h = tl.associative_scan((tl.exp2(span * decays[n]), update), 0, _then)
            h += fade * states[n]
            after = after + (tl.sum(tl.where(last, h, 0), 0, keep_dims=True),)
            y_t += cs[n].to(tl.float32)[:, None] * h
        states = after
        for i in tl.static_range(len(terms)):
            at = sums + ((i * tl.num_programs(2) * images + row) * length + t) * tl.num_programs(0) + tl.program_id(0)
            tl.store(at, tl.sum(tl.where(mask, terms[i](dt, u_t, y_t, maximum), 0), 1), exists)
        tl.store(outputs + t[:, None] * channels, y_t.to(outputs.dtype.element_ty), mask)
        t, t_next, low_t, u_now, bs, cs = t_next, t_after, low_next, u_next, b_next, c_next
