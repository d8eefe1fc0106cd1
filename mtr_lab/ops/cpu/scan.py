"""The selective scan, forward."""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from mtr_lab.ops.cpu.arrays import NO_FACTOR, NO_GAP, add_blocks, array, raster, rows
from mtr_lab.ops.cpu.formulas import AHEAD, LOG2E, exp2, f32, geometric_sum, scratch, silu, softplus
from mtr_lab.ops.cpu.scan_statistics import GROUP, numbers, with_terms
from mtr_lab.ops.cpu.threads import run
from mtr_lab.ops.cpu.vectors import BLOCK, load, multiply_add, prefetch, store
from mtr_lab.ops.scan_inputs import ScanInputs


def selective_scan(inputs: ScanInputs, stats: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The contract of ``selective_scan_reference``, for a float32 ``u`` on the CPU and negative ``A``."""
    u, delta, A, B, C, D, z, delta_bias, order, gap, delta_scale, repeats, reverse = inputs
    images, length, channels = u.shape[1:]
    y = u.new_empty(images, length, channels)
    blocks = -(-channels // BLOCK)
    sums = u.new_empty(blocks, *u.shape[:3], len(stats))
    run(
        with_terms(scan),
        *(part for x in (u, delta, B, C, y[None, :0] if z is None else z[None]) for part in rows(x)),
        0,
        *(array(x) for x in (y[:0], A.mT, D, torch.zeros_like(D) if delta_bias is None else delta_bias)),
        raster(length, tuple(reverse)) if order is None else order.contiguous().numpy(),
        NO_GAP if gap is None else array(gap),
        *(NO_FACTOR if factor is None else array(factor) for factor in (delta_scale, repeats)),
        z is not None,
        np.float32(1),
        y.numpy(),
        y.numpy(),
        numbers(stats),
        sums.numpy(),
    )
    return y, add_blocks(sums)


_add_up: Any = None  # replaced by ``with_terms``


def scan(
    u, u_step, delta, delta_step, B, B_step, C, C_step, z, z_step, rank, timescale, A, D, bias, order, gap, delta_scale,
    repeats, gated, scale, partial, y, stats, sums,
):  # fmt: skip
    """``delta`` are Δ (E), or with a ``rank`` R > 0 the inputs (R) of their projection by ``timescale`` (G, ≥ R, E).

    A is (G, N, E). ``scale`` is a factor of the gate. All directions but the last add up in ``partial`` (B, L, E),
    which is float32 and may be ``y``. ``stats``: the numbers of the terms that fill the last dimension of ``sums``.
    """
    directions, states, channels = A.shape
    images, length, _ = y.shape
    blocks, result, sum_so_far = -(-channels // BLOCK), y.reshape(-1), partial.reshape(-1)
    exponents, projections, skips, shifts = A.reshape(-1), timescale.reshape(-1), D.reshape(-1), bias.reshape(-1)
    for unit in numba.prange(images * blocks):
        image, block = divmod(np.int64(unit), blocks)
        first = block * BLOCK
        width = min(BLOCK, channels - first)
        row = image if order.shape[1] > 1 else 0  # one order may serve all images
        # Lanes beyond the last channel stay zero.
        exponent, state, projection = scratch(states * BLOCK), scratch(states * BLOCK), scratch(rank * BLOCK)
        skip, shift, idle, total = scratch(BLOCK), scratch(BLOCK), scratch(BLOCK), scratch(GROUP)
        dts, inputs, outputs = scratch(GROUP * BLOCK), scratch(GROUP * BLOCK), scratch(GROUP * BLOCK)

        for g in range(directions):
            state[:] = 0
            is_last = g == directions - 1
            store(skip, 0, load(skips, g * channels + first, width), BLOCK)
            store(shift, 0, load(shifts, g * channels + first, width), BLOCK)
            store(idle, 0, softplus(load(shift, 0, BLOCK)), width)
            for n in range(states):
                at = (g * states + n) * channels + first
                store(exponent, n * BLOCK, load(exponents, at, width) * LOG2E, BLOCK)
            for r in range(rank):
                at = (g * timescale.shape[1] + r) * channels + first
                store(projection, r * BLOCK, load(projections, at, width), BLOCK)
            first_u = g * u_step[0] + image * u_step[1] + first
            first_delta = g * delta_step[0] + image * delta_step[1] + (0 if rank > 0 else first)
            first_B, first_C = g * B_step[0] + image * B_step[1], g * C_step[0] + image * C_step[1]
            first_y, first_z = image * length * channels + first, image * z_step[1] + first

            # By groups of tokens, so that neither Δ nor the gate of a token waits for the state of the one before.
            for begin in range(0, length, GROUP):
                group = min(GROUP, length - begin)
                for k in range(group):
                    t = order[g, row, begin + k]
                    later = order[g, row, min(begin + k + AHEAD, length - 1)]
                    prefetch(u, first_u + later * u_step[2])
                    prefetch(delta, first_delta + later * delta_step[2])
                    prefetch(result, first_y + t * channels)
                    factor = delta_scale[image, t] if delta_scale.shape[0] > 0 else f32(1)
                    factor *= repeats[image, t] if repeats.shape[0] > 0 else f32(1)
                    raw = load(shift, 0, BLOCK)
                    if rank == 0:
                        raw = raw + load(delta, first_delta + t * delta_step[2], width)
                    for r in range(rank):
                        raw = multiply_add(
                            load(projection, r * BLOCK, BLOCK), delta[first_delta + t * delta_step[2] + r], raw
                        )
                    store(dts, k * BLOCK, softplus(raw) * factor, width)
                    store(inputs, k * BLOCK, load(u, first_u + t * u_step[2], width), BLOCK)

                for k in range(group):
                    t = order[g, row, begin + k]
                    B_t, C_t = first_B + t * B_step[2], first_C + t * C_step[2]
                    times = repeats[image, t] if repeats.shape[0] > 0 else f32(1)
                    gap_t = gap[image, g, begin + k] if gap.shape[0] > 0 else f32(0)
                    dt, u_t = load(dts, k * BLOCK, BLOCK), load(inputs, k * BLOCK, BLOCK)
                    decay = dt + gap_t * load(idle, 0, BLOCK)
                    out = load(skip, 0, BLOCK) * u_t
                    if times == f32(1):
                        write = dt * u_t
                        for n in range(states):
                            at = n * BLOCK
                            kept = exp2(decay * load(exponent, at, BLOCK)) * load(state, at, BLOCK)
                            h = multiply_add(write, B[B_t + n], kept)
                            store(state, n * BLOCK, h, BLOCK)
                            out = multiply_add(h, C[C_t + n], out)
                    else:
                        once = dt / times
                        write = once * u_t
                        for n in range(states):
                            growth = geometric_sum(once * load(exponent, n * BLOCK, BLOCK), times)
                            kept = exp2(decay * load(exponent, n * BLOCK, BLOCK)) * load(state, n * BLOCK, BLOCK)
                            h = multiply_add(write * growth, B[B_t + n], kept)
                            store(state, n * BLOCK, h, BLOCK)
                            out = multiply_add(h, C[C_t + n], out)
                    store(outputs, k * BLOCK, out, BLOCK)

                for k in range(group):
                    t = order[g, row, begin + k]
                    out = load(outputs, k * BLOCK, BLOCK)
                    if g > 0:
                        out = load(sum_so_far, first_y + t * channels, width) + out
                    if gated and is_last:
                        out = out * (silu(load(z, first_z + t * z_step[2], width)) * scale)
                    if is_last:
                        store(result, first_y + t * channels, out, width)
                    else:
                        store(sum_so_far, first_y + t * channels, out, width)

                for i in range(len(stats)):
                    _add_up(stats[i], dts, inputs, outputs, total)
                    for k in range(group):
                        sums[block, g, image, order[g, row, begin + k], i] = total[k]
