"""The output of the mixer for one token of each image."""

import numba
import numpy as np
import torch
from torch import Tensor

from mtr_lab.ops.cpu.arrays import NO_FACTOR, NO_GAP, NO_POSITIONS, array, rows
from mtr_lab.ops.cpu.compiled import jit
from mtr_lab.ops.cpu.convolution import conv
from mtr_lab.ops.cpu.formulas import LOG2E, exp2, f32, geometric_sum, silu, softplus
from mtr_lab.ops.cpu.threads import run
from mtr_lab.ops.cpu.vectors import BLOCK
from mtr_lab.ops.onednn import linear
from mtr_lab.ops.packed import PackedWeights


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
    """The contract of ``mtr_lab.ops.mamba_inner_read`` for S = 1, a forward and a backward direction.

    Rows are the forward tokens of all images, then their backward ones, so that each direction is one product.
    """
    x, weights = x.float(), PackedWeights(*(t.float() for t in weights))
    images, length, channels = x.shape
    states, rank = weights.a.shape[1], weights.timescale.shape[1]
    position = read[:, 0].numpy()
    begin = np.stack([np.zeros_like(position), position])
    end = np.stack([position + 1, np.full_like(position, length)])
    after = (end - begin).cumsum().reshape(2, images)  # the row behind each window
    windows = begin, end, after - (end - begin)
    u = x.new_empty(images * (length + 1), channels)
    positions = [NO_POSITIONS if t is None else t.contiguous().numpy() for t in (index, source)]
    run(
        conv, *rows(x[None]), array(weights.conv_weight), array(weights.conv_bias), *positions,
        np.array([0, 1]), length, *windows, u.numpy(),
    )  # fmt: skip
    projected, delta = u.new_empty(len(u), rank + 2 * states), torch.empty_like(u)
    for g, window in enumerate((slice(after[0, -1]), slice(after[0, -1], None))):
        projected[window] = linear(u[window], weights.projection[g].T)
        delta[window] = linear(projected[window, :rank], weights.timescale[g].T)
    y = torch.empty(z.shape)
    run(
        _read, u.numpy(), delta.numpy(), projected.view(-1)[rank:].numpy(), projected.shape[1],
        *(array(t) for t in (z[:, 0], weights.a, weights.d, weights.timescale_bias)), *windows,
        NO_GAP if gap is None else array(gap),
        *(NO_FACTOR if factor is None else array(factor) for factor in (delta_scale, repeats)),
        np.float32(scale), y[:, 0].numpy(),
    )  # fmt: skip
    return y.to(z.dtype)


@jit(parallel=True)
def _read(
    u, delta, bc, bc_step, z, a, D, bias, begin, end, start, gap, delta_scale, repeats, scale, y,
):  # fmt: skip
    """The output of the token that ends the forward window of an image and begins the backward one, written to ``y``.

    Not by a recurrence: what each token writes into the state decays by the sum of Δ from there on. ``u``, ``delta``
    and ``bc`` (B and C side by side) are rows of the windows, which are as in ``conv``; ``z`` and ``y`` are (B, E), and
    ``a`` is A, (G, N, E).
    """
    directions, states, channels = a.shape
    images, length = y.shape[0], end[1, 0]
    blocks = -(-channels // BLOCK)
    for unit in numba.prange(images * blocks):
        image, block = divmod(np.int64(unit), blocks)
        first = block * BLOCK
        width = min(BLOCK, channels - first)
        exponent = np.zeros((states, BLOCK), f32)
        state = np.zeros((states, BLOCK), f32)
        span, shift, idle, dt, once, write, out = np.zeros((7, BLOCK), f32)
        for g in range(directions):
            state[:] = 0
            span[:] = 0
            for j in range(width):
                shift[j] = bias[g, first + j]
                idle[j] = softplus(shift[j])
                for n in range(states):
                    exponent[n, j] = a[g, n, first + j] * LOG2E
            tokens = end[g, image] - begin[g, image]
            at = start[g, image] if g else start[g, image] + tokens - 1
            for k in range(tokens):
                row, t = (at + k, begin[g, image] + k) if g else (at - k, end[g, image] - 1 - k)
                u_t, delta_t = u[row, first : first + width], delta[row, first : first + width]
                B_t = bc[row * bc_step : row * bc_step + states]
                scale_t = delta_scale[image, t] if delta_scale.shape[0] > 0 else f32(1)
                times = repeats[image, t] if repeats.shape[0] > 0 else f32(1)
                step = length - 1 - t if g else t
                gap_t = gap[image, g, step] if gap.shape[0] > 0 else f32(0)
                for j in range(width):
                    dt[j] = softplus(delta_t[j] + shift[j]) * scale_t
                for j in range(width):
                    write[j] = dt[j] * u_t[j]
                if times == f32(1):
                    for n in range(states):
                        for j in range(BLOCK):
                            state[n, j] += exp2(span[j] * exponent[n, j]) * write[j] * B_t[n]
                else:
                    for j in range(BLOCK):
                        once[j] = dt[j]
                        dt[j] *= times
                    for n in range(states):
                        for j in range(BLOCK):
                            growth = geometric_sum(once[j] * exponent[n, j], times)
                            state[n, j] += exp2(span[j] * exponent[n, j]) * write[j] * growth * B_t[n]
                for j in range(BLOCK):
                    span[j] += dt[j] + gap_t * idle[j]
            C_t = bc[at * bc_step + states : at * bc_step + 2 * states]
            for n in range(states):
                for j in range(BLOCK):
                    out[j] += state[n, j] * C_t[n]
            for j in range(width):
                out[j] += D[g, first + j] * u[at, first + j]
        for j in range(width):
            y[image, first + j] = out[j] * silu(z[image, first + j]) * scale
