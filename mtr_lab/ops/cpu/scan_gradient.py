"""The gradients of the selective scan."""

import numba
import numpy as np
import torch
from torch import Tensor

from mtr_lab.ops.cpu.arrays import NO_FACTOR, NO_GAP, add_blocks, array, raster, rows
from mtr_lab.ops.cpu.compiled import jit
from mtr_lab.ops.cpu.formulas import AHEAD, LN2, LOG2E, exp2, f32, sigmoid, silu, softplus, token_row
from mtr_lab.ops.cpu.threads import run
from mtr_lab.ops.cpu.vectors import BLOCK
from mtr_lab.ops.scan_inputs import ScanInputs


def selective_scan_backward(inputs: ScanInputs, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The contract of ``selective_scan_backward_reference`` without ``repeats``, for inputs as of ``selective_scan``.

    Each thread keeps the states of one image, one direction and ``BLOCK`` channels at all tokens.
    """
    u, delta, A, B, C, D, z, delta_bias, order, gap, delta_scale, _, reverse = inputs
    directions, images, length, channels = u.shape
    states, blocks = A.shape[2], -(-channels // BLOCK)
    du, ddelta = torch.empty_like(u, memory_format=torch.contiguous_format), u.new_empty(u.shape)
    dA = u.new_empty(images, directions, states, channels)
    dB, dC = (u.new_empty(blocks, *u.shape[:3], states) for _ in range(2))  # results may not share memory
    dD, dbias = (u.new_empty(images, directions, channels) for _ in range(2))
    dz = u.new_empty(0 if z is None else images, length, channels)
    run(
        _scan_gradient,
        *(part for x in (u, delta, B, C, dz[None, :0] if z is None else z[None], grad[None]) for part in rows(x)),
        *(array(x) for x in (A, D, torch.zeros_like(D) if delta_bias is None else delta_bias)),
        raster(length, tuple(reverse)) if order is None else order.contiguous().numpy(),
        NO_GAP if gap is None else array(gap),
        NO_FACTOR if delta_scale is None else array(delta_scale),
        z is not None,
        *(t.numpy() for t in (du, ddelta, dA, dB, dC, dD, dz, dbias)),
    )
    sums = add_blocks(dA).mT, add_blocks(dB), add_blocks(dC), add_blocks(dD)
    return du, ddelta, *sums, None if z is None else dz, None if delta_bias is None else add_blocks(dbias)


@jit(fastmath={"nsz", "contract", "reassoc"})
def _lane_sum(x, y):
    """Σ x y over a block of channels, in the order that vectorises."""
    total = f32(0)
    for j in range(BLOCK):
        total += x[j] * y[j]
    return total


@jit(parallel=True)
def _scan_gradient(
    u, u_step, delta, delta_step, B, B_step, C, C_step, z, z_step, grad, grad_step, A, D, bias, order, gap, delta_scale,
    gated, du, ddelta, dA, dB, dC, dD, dz, dbias,
):  # fmt: skip
    """The gradients of ``_scan`` without repeats: the states once more, kept, then their adjoints from the last step.

    ``dA`` (images, G, N, E), ``dD`` and ``dbias`` (images, G, E), ``dB`` and ``dC`` (blocks, G, B, L, N) are parts of
    sums over images or blocks.
    """
    directions, channels, states = A.shape
    images, length = du.shape[1:3]
    blocks = -(-channels // BLOCK)
    for unit in numba.prange(images * blocks):
        image, block = divmod(np.int64(unit), blocks)
        first = block * BLOCK
        width = min(BLOCK, channels - first)
        row = image if order.shape[1] > 1 else 0
        # Lanes beyond the last channel stay zero.
        exponent, slope, adjoint = np.zeros((3, states, BLOCK), f32)
        history = np.zeros((length + 1, states, BLOCK), f32)  # the state before each step
        out = np.zeros((length, BLOCK), f32)  # before the gate, summed over directions
        skip, shift, idle, idle_slope, into, dt, span, write, g_t, of_write, of_span = np.zeros((11, BLOCK), f32)
        sum_bias, sum_idle, sum_skip = np.zeros((3, BLOCK), f32)

        for g in range(directions):
            adjoint[:], slope[:], sum_bias[:], sum_idle[:], sum_skip[:] = f32(0), f32(0), f32(0), f32(0), f32(0)
            for j in range(width):
                skip[j] = D[g, first + j]
                shift[j] = bias[g, first + j]
                idle[j] = softplus(shift[j])
                idle_slope[j] = sigmoid(shift[j])
                for n in range(states):
                    exponent[n, j] = A[g, first + j, n] * LOG2E

            for step in range(length):
                t = order[g, row, step]
                later = order[g, row, min(step + AHEAD, length - 1)]
                u_t = token_row(u, u_step, g, image, t, later, first, width)
                delta_t = token_row(delta, delta_step, g, image, t, later, first, width)
                B_t = token_row(B, B_step, g, image, t, later, 0, states)
                C_t = token_row(C, C_step, g, image, t, later, 0, states)
                scale_t = delta_scale[image, t] if delta_scale.shape[0] > 0 else f32(1)
                gap_t = gap[image, g, step] if gap.shape[0] > 0 else f32(0)
                before, after, out_t = history[step], history[step + 1], out[t]
                for j in range(width):
                    dt[j] = softplus(delta_t[j] + shift[j]) * scale_t
                for j in range(width):
                    span[j] = dt[j] + gap_t * idle[j]
                for j in range(width):
                    write[j] = dt[j] * u_t[j]
                    out_t[j] += skip[j] * u_t[j]
                for n in range(states):
                    for j in range(BLOCK):
                        after[n, j] = exp2(span[j] * exponent[n, j]) * before[n, j] + write[j] * B_t[n]
                        out_t[j] += after[n, j] * C_t[n]

            for step in range(length - 1, -1, -1):
                t = order[g, row, step]
                later = order[g, row, max(step - AHEAD, 0)]
                u_t = token_row(u, u_step, g, image, t, later, first, width)
                delta_t = token_row(delta, delta_step, g, image, t, later, first, width)
                B_t = token_row(B, B_step, g, image, t, later, 0, states)
                C_t = token_row(C, C_step, g, image, t, later, 0, states)
                y_t = token_row(grad, grad_step, 0, image, t, later, first, width)
                scale_t = delta_scale[image, t] if delta_scale.shape[0] > 0 else f32(1)
                gap_t = gap[image, g, step] if gap.shape[0] > 0 else f32(0)
                before, after = history[step], history[step + 1]
                for j in range(width):
                    g_t[j] = y_t[j]
                if gated:
                    z_t = token_row(z, z_step, 0, image, t, later, first, width)
                    for j in range(width):
                        g_t[j] *= silu(z_t[j])
                for j in range(width):
                    into[j] = sigmoid(delta_t[j] + shift[j]) * scale_t
                for j in range(width):
                    dt[j] = softplus(delta_t[j] + shift[j]) * scale_t
                for j in range(width):
                    span[j] = dt[j] + gap_t * idle[j]
                    write[j] = dt[j] * u_t[j]
                of_write[:], of_span[:] = f32(0), f32(0)
                for n in range(states):
                    for j in range(BLOCK):
                        adjoint[n, j] += g_t[j] * C_t[n]
                        of_write[j] += adjoint[n, j] * B_t[n]
                    dB[block, g, image, t, n] = _lane_sum(adjoint[n], write)
                    dC[block, g, image, t, n] = _lane_sum(after[n], g_t)
                    for j in range(BLOCK):
                        adjoint[n, j] *= exp2(span[j] * exponent[n, j])  # now of the state before this step
                        of_product = adjoint[n, j] * before[n, j]
                        of_span[j] += of_product * exponent[n, j]
                        slope[n, j] += of_product * span[j]
                du_t = du[g, image, t, first : first + width]
                ddelta_t = ddelta[g, image, t, first : first + width]
                for j in range(width):
                    du_t[j] = of_write[j] * dt[j] + g_t[j] * skip[j]
                    sum_skip[j] += g_t[j] * u_t[j]
                    of_span[j] *= LN2
                    ddelta_t[j] = (of_write[j] * u_t[j] + of_span[j]) * into[j]
                    sum_bias[j] += ddelta_t[j]
                    sum_idle[j] += of_span[j] * gap_t
            for j in range(width):
                dD[image, g, first + j] = sum_skip[j]
                dbias[image, g, first + j] = sum_bias[j] + sum_idle[j] * idle_slope[j]
                for n in range(states):
                    dA[image, g, n, first + j] = slope[n, j]

        if gated:
            for t in range(length):
                z_t = token_row(z, z_step, 0, image, t, t, first, width)
                y_t = token_row(grad, grad_step, 0, image, t, t, first, width)
                dz_t, out_t = dz[image, t, first : first + width], out[t]
                for j in range(width):
                    gate = sigmoid(z_t[j])
                    dz_t[j] = y_t[j] * out_t[j] * gate * (f32(1) + z_t[j] * (f32(1) - gate))
