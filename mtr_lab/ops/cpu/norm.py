"""Residual addition, normalisation and the plan of a reduction in one pass."""

import numba
import numpy as np
import torch
from torch import Tensor

from mtr_lab.ops.cpu.arrays import NO_FACTOR, NO_POSITIONS, array, memory_of
from mtr_lab.ops.cpu.compiled import jit
from mtr_lab.ops.cpu.formulas import dot, f32, scratch
from mtr_lab.ops.cpu.threads import run, share_of
from mtr_lab.ops.cpu.vectors import BLOCK, load, multiply_add, store, sum_of_lanes

TOKENS = 8  # in one piece of work: few, so that threads share the tokens of one image evenly


def norm_add(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    keep: Tensor | None,
    *lists: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The result of the operator ``mtr_lab::norm_add`` on the CPU, for ``hidden`` in float32 or bfloat16."""
    merged = hidden.shape if keep is None else (*keep.shape, hidden.shape[2])
    normed, total = hidden.new_empty(merged), torch.empty(merged)
    before = weight.new_empty(0, 0, 0) if residual is None else residual
    run(
        _norm_add, memory_of(hidden.contiguous()), *_lists(*lists[:3] if hidden.shape != merged else ()),
        array(before), *_lists(*lists[3:]), NO_POSITIONS if keep is None else keep.contiguous().numpy(),
        *(array(t) for t in (weight, weight[:0] if bias is None else bias)), np.float32(eps),
        memory_of(normed), total.numpy(), share=share_of(total.numel()),
    )  # fmt: skip
    return normed, total


def _lists(share: Tensor | None = None, *lists: Tensor | None) -> tuple[np.ndarray, ...]:
    """Of a plan: share, removed and offsets; empty without one."""
    if share is None:
        return NO_FACTOR, NO_POSITIONS, NO_POSITIONS
    return array(share), *(t.contiguous().numpy() for t in lists if t is not None)


def apply_plan(
    x: Tensor, dest: Tensor, weight: Tensor, keep: Tensor, removed: Tensor, offsets: Tensor | None = None
) -> Tensor:
    """The contract of ``apply_plan_reference``, for a float32 ``x`` on the CPU, and the same bits."""
    y = x.new_empty(x.shape[0], keep.shape[1], x.shape[2])
    places = (t.contiguous().numpy() for t in (dest, keep, removed))
    run(_apply_plan, array(x), array(weight), *places, y.numpy())
    return y


@jit(parallel=True)
def _norm_add(
    hidden, hidden_share, hidden_removed, hidden_offsets, residual, share, removed, offsets, keep, weight, bias, eps,
    normed, total,
):  # fmt: skip
    """``norm_add`` of two streams (B, L, C) with a plan for each, written to ``normed`` and ``total`` (B, M, C).

    ``keep`` is empty without a plan, ``hidden_removed`` if ``hidden`` has M tokens already, ``residual`` before the
    first block, and ``bias`` for RMSNorm.
    """
    images, kept, channels = total.shape
    parts, planned, merges = -(-kept // TOKENS), keep.shape[0] > 0, hidden_removed.shape[0] > 0
    first_stream, second_stream = hidden.reshape(-1), residual.reshape(-1)
    streams, norms = total.reshape(-1), normed.reshape(-1)
    for unit in numba.prange(images * parts):
        image, part = divmod(np.int64(unit), parts)
        row = scratch(-(-channels // BLOCK) * BLOCK)  # lanes beyond the last channel stay zero
        for j in range(part * TOKENS, min(part * TOKENS + TOKENS, kept)):
            token, to = keep[image, j] if planned else j, (image * kept + j) * channels
            mean = square = f32(0)
            for c in range(0, channels, BLOCK):
                width = min(BLOCK, channels - c)
                if merges:
                    at = image * hidden.shape[1] * channels + c
                    value = load(first_stream, at + token * channels, width) * hidden_share[image, token]
                    for k in range(hidden_offsets[image, j], hidden_offsets[image, j + 1]):
                        t = hidden_removed[image, k]
                        value = multiply_add(
                            load(first_stream, at + t * channels, width), hidden_share[image, t], value
                        )
                else:
                    value = load(first_stream, to + c, width)
                if planned and residual.shape[0] > 0:
                    at = image * residual.shape[1] * channels + c
                    value = multiply_add(load(second_stream, at + token * channels, width), share[image, token], value)
                    for k in range(offsets[image, j], offsets[image, j + 1]):
                        t = removed[image, k]
                        value = multiply_add(load(second_stream, at + t * channels, width), share[image, t], value)
                elif residual.shape[0] > 0:
                    value = value + load(second_stream, to + c, width)
                store(streams, to + c, value, width)
                store(row, c, value, BLOCK)
                mean += sum_of_lanes(value)
            mean = mean / f32(channels) if bias.shape[0] > 0 else f32(0)
            for c in range(0, channels, BLOCK):
                store(row, c, load(row, c, BLOCK) - mean, min(BLOCK, channels - c))
                square += dot(row, c, c, BLOCK)
            factor = f32(1) / np.sqrt(square / f32(channels) + eps)
            for c in range(0, channels, BLOCK):
                width = min(BLOCK, channels - c)
                value = load(row, c, BLOCK) * factor * load(weight, c, width)
                if bias.shape[0] > 0:
                    value = value + load(bias, c, width)
                store(norms, to + c, value, width)


@jit(parallel=True, fastmath=False)
def _apply_plan(x, weight, dest, keep, removed, y):
    """``apply_plan``, written to ``y`` (B, M, E)."""
    images, kept, channels = y.shape
    blocks = -(-channels // BLOCK)
    for unit in numba.prange(images * blocks):
        image, block = divmod(np.int64(unit), blocks)
        first = block * BLOCK
        width = min(BLOCK, channels - first)
        for j in range(kept):
            token = keep[image, j]
            share = weight[image, token]
            x_t, y_j = x[image, token, first : first + width], y[image, j, first : first + width]
            for e in range(width):
                y_j[e] = share * x_t[e]
        for k in range(removed.shape[1]):
            token = removed[image, k]
            share, j = weight[image, token], dest[image, token]
            if j >= 0:
                x_t, y_j = x[image, token, first : first + width], y[image, j, first : first + width]
                for e in range(width):
                    y_j[e] += share * x_t[e]
