"""The scan of several paths that read Δ, B and C of the same token at a step."""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from torch import Tensor

from mtr_lab.ops.cpu.arrays import add_blocks, array, rows
from mtr_lab.ops.cpu.formulas import AHEAD, LOG2E, exp2, scratch, silu, softplus
from mtr_lab.ops.cpu.scan_statistics import GROUP, numbers, with_terms
from mtr_lab.ops.cpu.threads import run
from mtr_lab.ops.cpu.vectors import BLOCK, load, multiply_add, prefetch, store


def scan_by_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    order: Tensor,
    moves: Tensor,
    z: Tensor | None,
    delta_bias: Tensor,
    stats: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """The contract of ``mtr_lab.ops.scan_by_step``, for a float32 ``u`` on the CPU and negative ``A``."""
    y = u.new_empty(u.shape)
    sums = u.new_empty(-(-u.shape[2] // BLOCK), len(order), *u.shape[:2], len(stats))
    run(
        with_terms(_scan_by_step),
        *(part for x in (u, delta, B, C, y[:0] if z is None else z) for part in rows(x[None])),
        *(array(x) for x in (A, D, delta_bias)),
        order.contiguous().numpy(),
        array(moves),
        z is not None,
        y.numpy(),
        numbers(stats),
        sums.numpy(),
    )
    return y, add_blocks(sums)


_add_up: Any = None  # replaced by ``with_terms``


def _scan_by_step(
    u, u_step, delta, delta_step, B, B_step, C, C_step, z, z_step, A, D, bias, order, moves, gated, y, stats, sums,
):  # fmt: skip
    """All paths read Δ, B and C of the same token at a step, so one exponential serves them all.

    A is (E, N), D and bias are (E,), order is (G, L), moves (G, L, N). The results have the same bits as ``_scan``'s.
    """
    paths, states, channels = order.shape[0], A.shape[1], A.shape[0]
    images, length, _ = y.shape
    blocks, result = -(-channels // BLOCK), y.reshape(-1)
    for unit in numba.prange(images * blocks):
        image, block = divmod(np.int64(unit), blocks)
        first = block * BLOCK
        width = min(BLOCK, channels - first)
        # Lanes beyond the last channel stay zero.
        exponent, state = scratch(states * BLOCK), scratch(paths * states * BLOCK)
        skip, shift, total = scratch(BLOCK), scratch(BLOCK), scratch(GROUP)
        write, out = scratch(paths * BLOCK), scratch(paths * BLOCK)
        outputs = scratch(paths * length * BLOCK)  # added up at the end, in the order of the paths
        collected = scratch(paths * 3 * GROUP * BLOCK)
        rows = collected.reshape(paths, 3, GROUP * BLOCK)
        for j in range(width):
            skip[j] = D[first + j]
            shift[j] = bias[first + j]
            for n in range(states):
                exponent[n * BLOCK + j] = A[first + j, n] * LOG2E
        first_u, first_delta = image * u_step[1] + first, image * delta_step[1] + first
        first_B, first_C = image * B_step[1], image * C_step[1]

        for step in range(length):
            ahead, place = min(step + AHEAD, length - 1), step % GROUP
            prefetch(delta, first_delta + ahead * delta_step[2])
            dt = softplus(load(delta, first_delta + step * delta_step[2], width) + load(shift, 0, BLOCK))
            for g in range(paths):
                prefetch(u, first_u + order[g, ahead] * u_step[2])
                u_t = load(u, first_u + order[g, step] * u_step[2], width)
                store(write, g * BLOCK, dt * u_t, BLOCK)
                store(out, g * BLOCK, load(skip, 0, BLOCK) * u_t, BLOCK)
                if len(stats) > 0:
                    store(collected, (3 * g * GROUP + place) * BLOCK, dt, width)
                    store(collected, ((3 * g + 1) * GROUP + place) * BLOCK, u_t, BLOCK)
            B_t, C_t = first_B + step * B_step[2], first_C + step * C_step[2]
            for n in range(states):
                decay = exp2(dt * load(exponent, n * BLOCK, BLOCK))
                for g in range(paths):
                    at = (g * states + n) * BLOCK
                    kept = decay * load(state, at, BLOCK)
                    h = multiply_add(load(write, g * BLOCK, BLOCK), B[B_t + n] + moves[g, step, n], kept)
                    store(state, at, h, BLOCK)
                    store(out, g * BLOCK, multiply_add(h, C[C_t + n], load(out, g * BLOCK, BLOCK)), BLOCK)
            for g in range(paths):
                y_t = load(out, g * BLOCK, BLOCK)
                store(outputs, (g * length + order[g, step]) * BLOCK, y_t, BLOCK)
                if len(stats) > 0:
                    store(collected, ((3 * g + 2) * GROUP + place) * BLOCK, y_t, BLOCK)
            if len(stats) > 0 and (place == GROUP - 1 or step == length - 1):
                for g in range(paths):
                    for i in range(len(stats)):
                        _add_up(stats[i], rows[g, 0], rows[g, 1], rows[g, 2], total)
                        for k in range(place + 1):
                            sums[block, g, image, order[g, step - place + k], i] = total[k]

        for t in range(length):
            y_t = load(outputs, t * BLOCK, BLOCK)
            for g in range(1, paths):
                y_t = y_t + load(outputs, (g * length + t) * BLOCK, BLOCK)
            if gated:
                y_t = y_t * silu(load(z, image * z_step[1] + t * z_step[2] + first, width))
            store(result, (image * length + t) * channels + first, y_t, width)
