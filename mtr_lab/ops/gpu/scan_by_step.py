"""A scan along several paths of which the input alone follows the path: Δ and the decay of a step are computed once.

A program is one warp, with some channels of one image and their states on every path. A step has the same Δ, decay and
C on all paths; each path reads the input of another token, and adds the vector of its move to B. The outputs of the
paths are stored apart and added, with the gate, by a second kernel: at one step paths are at different tokens.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.add_paths import add_paths
from mtr_lab.ops.gpu.formulas import LOG2E, maximum, softplus, terms
from mtr_lab.ops.gpu.occupancy import STAGES, check_launch, on_its_device, registers, unstack
from mtr_lab.ops.gpu.scan_walk import tile

CHANNELS = 32  # of a program
UNROLL = 2  # steps loaded at a time
REGISTERS = registers(168)


@on_its_device
def scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    bias: Tensor,
    order: Tensor,
    z: Tensor | None,
    stats: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """The result of ``mtr_lab.ops.scan_by_step`` for float32, float16 or bfloat16 data, accumulated in float32.

    Args:
        u, delta: (B, L, E), contiguous.
        a: (N, E) float32, contiguous; N is a power of two.
        b: (B, L, 4, N), contiguous: B with the moves of each path.
        c: (B, L, N), innermost dimension contiguous.
        d, bias: (E,) float32, contiguous.
        order: (G, L) int64, contiguous; four paths at most.
        z: (B, L, E); ``None`` for no gate.
    """
    images, length, channels = u.shape
    check_launch(images)
    paths, blocks = len(order), triton.cdiv(channels, CHANNELS)
    outputs = u.new_empty(paths, *u.shape)
    sums = u.new_empty(len(stats), paths, images, length, blocks, dtype=torch.float32)
    _scan_by_step[blocks, images](
        u, delta, a, b, c, d, bias, order, outputs, sums, terms(stats), length, channels, *c.stride()[:2], G=paths,
        N=a.shape[0], CH=CHANNELS, U=UNROLL, EVEN=channels % CHANNELS == 0, num_warps=1, **REGISTERS,
    )  # fmt: skip
    sums = sums.sum(-1).movedim(0, -1).contiguous() if stats else sums.view(paths, images, length, 0)
    return add_paths(outputs, z), sums


@triton.jit
def _step(h, fade, dt, u_t, b_t, c_t, d_e):
    """The state after a step of one path, and its output."""
    h = fade * h + (dt * u_t)[None, :] * b_t[:, None]
    return h, d_e * u_t + tl.sum(h * c_t[:, None], 0)


@triton.jit
def _inputs(u, order, e, here, s0, channels: tl.constexpr, EVEN: tl.constexpr, U: tl.constexpr):
    """The channels of the tokens at U steps of a path, U times (CH,)."""
    at = u + tl.load(order + s0 + tl.arange(0, U))[:, None] * channels + e[None, :]
    return unstack(tl.load(at) if EVEN else tl.load(at, here[None, :], 0), U)


@triton.jit
def _finish(outputs, sums, terms, order, s, y_t, dt, u_t, e, here, channels: tl.constexpr, stride_sums,
            EVEN: tl.constexpr):  # fmt: skip
    """Store the output and the statistics of one step of one path."""
    t = tl.load(order + s)
    at = sums + t * tl.num_programs(0) + tl.program_id(0)
    for i in tl.static_range(len(terms)):
        tl.store(at + i * stride_sums, tl.sum(terms[i](dt, u_t, y_t, maximum), 0))
    out, value = outputs + t * channels + e, y_t.to(outputs.dtype.element_ty)
    if EVEN:
        tl.store(out, value)
    else:
        tl.store(out, value, here)


@triton.jit
def _walk(h0, h1, h2, h3, first, count, u, delta, b, c, order, outputs, sums, terms, a_e, d_e, bias_e, e, here, length,
          channels: tl.constexpr, stride_c: tl.constexpr, step_outputs, step_sums, stride_sums, G: tl.constexpr,
          N: tl.constexpr, EVEN: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """``count`` steps from ``first`` on, a multiple of U, of all paths at once."""
    for i in tl.range(0, count, U, num_stages=STAGES):
        s0 = first + i
        step = tl.arange(0, U)[:, None]
        at = delta + (s0 + step) * channels + e[None, :]
        dts = unstack(tl.load(at) if EVEN else tl.load(at, here[None, :], 0), U)
        bs = unstack(tl.load(b + (s0 + step) * (4 * N) + tl.arange(0, 4 * N)[None, :]), U)
        cs = unstack(tl.load(c + (s0 + step) * stride_c + tl.arange(0, N)[None, :]), U)
        u0 = _inputs(u, order, e, here, s0, channels, EVEN, U)
        u1, u2, u3 = u0, u0, u0
        if G > 1:
            u1 = _inputs(u, order + length, e, here, s0, channels, EVEN, U)
        if G > 2:
            u2 = _inputs(u, order + 2 * length, e, here, s0, channels, EVEN, U)
        if G > 3:
            u3 = _inputs(u, order + 3 * length, e, here, s0, channels, EVEN, U)
        for k in tl.static_range(U):
            s = s0 + k
            dt = softplus(dts[k].to(tl.float32) + bias_e)
            if not EVEN:
                dt = tl.where(here, dt, 0)
            fade = tl.exp2(dt[None, :] * a_e)
            c_t = cs[k].to(tl.float32)
            b01, b23 = tl.split(tl.permute(tl.reshape(bs[k].to(tl.float32), (2, 2 * N)), (1, 0)))
            b0, b1 = tl.split(tl.permute(tl.reshape(b01, (2, N)), (1, 0)))
            b2, b3 = tl.split(tl.permute(tl.reshape(b23, (2, N)), (1, 0)))
            u_t = u0[k].to(tl.float32)
            h0, y_t = _step(h0, fade, dt, u_t, b0, c_t, d_e)
            _finish(outputs, sums, terms, order, s, y_t, dt, u_t, e, here, channels, stride_sums, EVEN)
            if G > 1:
                u_t = u1[k].to(tl.float32)
                h1, y_t = _step(h1, fade, dt, u_t, b1, c_t, d_e)
                _finish(outputs + step_outputs, sums + step_sums, terms, order + length, s, y_t, dt, u_t, e, here,
                        channels, stride_sums, EVEN)  # fmt: skip
            if G > 2:
                u_t = u2[k].to(tl.float32)
                h2, y_t = _step(h2, fade, dt, u_t, b2, c_t, d_e)
                _finish(outputs + 2 * step_outputs, sums + 2 * step_sums, terms, order + 2 * length, s, y_t, dt, u_t, e,
                        here, channels, stride_sums, EVEN)  # fmt: skip
            if G > 3:
                u_t = u3[k].to(tl.float32)
                h3, y_t = _step(h3, fade, dt, u_t, b3, c_t, d_e)
                _finish(outputs + 3 * step_outputs, sums + 3 * step_sums, terms, order + 3 * length, s, y_t, dt, u_t, e,
                        here, channels, stride_sums, EVEN)  # fmt: skip
    return h0, h1, h2, h3


@triton.jit(do_not_specialize=["length"])
def _scan_by_step(u, delta, a, b, c, d, bias, order, outputs, sums, terms, length, channels: tl.constexpr, stride_image,
                  stride_c: tl.constexpr, G: tl.constexpr, N: tl.constexpr, CH: tl.constexpr, U: tl.constexpr,
                  EVEN: tl.constexpr):  # fmt: skip
    e = tl.program_id(0) * CH + tl.arange(0, CH)
    image, images = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    here = e < channels
    a_e = tl.load(tile(a, e, channels, N, CH), here[None, :], 0) * LOG2E
    d_e = tl.load(d + e, here, 0)
    bias_e = tl.load(bias + e, here, 0)
    u += image * length * channels
    delta += image * length * channels
    outputs += image * length * channels
    b += image * length * (4 * N)
    c += image * stride_image
    sums += image * length * tl.num_programs(0)
    step_outputs, step_sums = images.to(tl.int64) * length * channels, images.to(tl.int64) * length * tl.num_programs(0)
    h = tl.zeros((N, CH), tl.float32)
    whole = length // U * U
    h0, h1, h2, h3 = _walk(h, h, h, h, 0, whole, u, delta, b, c, order, outputs, sums, terms, a_e, d_e, bias_e, e, here,
                           length, channels, stride_c, step_outputs, step_sums, G * step_sums, G, N, EVEN,
                           U)  # fmt: skip
    if whole < length:
        _walk(h0, h1, h2, h3, whole, length - whole, u, delta, b, c, order, outputs, sums, terms, a_e, d_e, bias_e, e,
              here, length, channels, stride_c, step_outputs, step_sums, G * step_sums, G, N, EVEN, 1)  # fmt: skip
