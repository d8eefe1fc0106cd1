"""The CPU implementations, float32, by the numba kernels in ``cpu_kernels``, which is imported on the first call."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtr_lab.ops.decision_inputs import DecisionInputs
from mtr_lab.ops.packed import PackedWeights
from mtr_lab.ops.scan_inputs import ScanInputs
from mtr_lab.ops.statistics import STATISTICS

_CACHED = 4 * 2**20  # bytes that convolved tokens may take, on few threads
_NO_GAP, _NO_FACTOR = np.zeros((0, 0, 0), np.float32), np.zeros((0, 0), np.float32)
_NO_POSITIONS = np.zeros((0, 0), np.int64)


def selective_scan(inputs: ScanInputs, stats: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The contract of ``selective_scan_reference``, for a float32 ``u`` on the CPU and negative ``A``."""
    from mtr_lab.ops import cpu_kernels

    u, delta, A, B, C, D, z, delta_bias, order, gap, delta_scale, repeats, reverse = inputs
    images, length, channels = u.shape[1:]
    y = u.new_empty(images, length, channels)
    blocks = -(-channels // cpu_kernels.BLOCK)
    sums = u.new_empty(blocks, *u.shape[:3], len(stats))
    cpu_kernels.run(
        cpu_kernels.scan(_terms()),
        *(part for x in (u, delta, B, C, y[None, :0] if z is None else z[None]) for part in _rows(x)),
        0,
        *(_array(x) for x in (y[:0], A.mT, D, torch.zeros_like(D) if delta_bias is None else delta_bias)),
        _raster(length, tuple(reverse)) if order is None else order.contiguous().numpy(),
        _NO_GAP if gap is None else _array(gap),
        *(_NO_FACTOR if factor is None else _array(factor) for factor in (delta_scale, repeats)),
        z is not None,
        np.float32(1),
        y.numpy(),
        _numbers(stats),
        sums.numpy(),
    )
    return y, _add_blocks(sums)


def selective_scan_backward(inputs: ScanInputs, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The contract of ``selective_scan_backward_reference`` without ``repeats``, for inputs as of ``selective_scan``.

    Each thread keeps the states of one image, one direction and ``BLOCK`` channels at all tokens.
    """
    from mtr_lab.ops import cpu_kernels

    u, delta, A, B, C, D, z, delta_bias, order, gap, delta_scale, _, reverse = inputs
    directions, images, length, channels = u.shape
    states, blocks = A.shape[2], -(-channels // cpu_kernels.BLOCK)
    du, ddelta = torch.empty_like(u, memory_format=torch.contiguous_format), u.new_empty(u.shape)
    dA = u.new_empty(images, directions, states, channels)
    dB, dC = (u.new_empty(blocks, *u.shape[:3], states) for _ in range(2))  # results may not share memory
    dD, dbias = (u.new_empty(images, directions, channels) for _ in range(2))
    dz = u.new_empty(0 if z is None else images, length, channels)
    cpu_kernels.run(
        cpu_kernels.scan_gradient,
        *(part for x in (u, delta, B, C, dz[None, :0] if z is None else z[None], grad[None]) for part in _rows(x)),
        *(_array(x) for x in (A, D, torch.zeros_like(D) if delta_bias is None else delta_bias)),
        _raster(length, tuple(reverse)) if order is None else order.contiguous().numpy(),
        _NO_GAP if gap is None else _array(gap),
        _NO_FACTOR if delta_scale is None else _array(delta_scale),
        z is not None,
        *(t.numpy() for t in (du, ddelta, dA, dB, dC, dD, dz, dbias)),
    )
    sums = _add_blocks(dA).mT, _add_blocks(dB), _add_blocks(dC), _add_blocks(dD)
    return du, ddelta, *sums, None if z is None else dz, None if delta_bias is None else _add_blocks(dbias)


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
    from mtr_lab.ops import cpu_kernels

    y = u.new_empty(u.shape)
    sums = u.new_empty(-(-u.shape[2] // cpu_kernels.BLOCK), len(order), *u.shape[:2], len(stats))
    cpu_kernels.run(
        cpu_kernels.scan(_terms(), by_step=True),
        *(part for x in (u, delta, B, C, y[:0] if z is None else z) for part in _rows(x[None])),
        *(_array(x) for x in (A, D, delta_bias)),
        order.contiguous().numpy(),
        _array(moves),
        z is not None,
        y.numpy(),
        _numbers(stats),
        sums.numpy(),
    )
    return y, _add_blocks(sums)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, reverse: Sequence[bool]) -> Tensor:
    """The contract of ``causal_conv1d_reference``, for a float32 ``x`` on the CPU."""
    return _convolve(x, weight, bias, _NO_POSITIONS, _NO_POSITIONS, reverse)


def causal_conv1d_unmerged(
    x: Tensor, weight: Tensor, bias: Tensor, index: Tensor, source: Tensor, reverse: Sequence[bool]
) -> Tensor:
    """The contract of ``causal_conv1d_unmerged_reference``, for a float32 ``x`` on the CPU."""
    return _convolve(x, weight, bias, index.contiguous().numpy(), source.contiguous().numpy(), reverse)


def neighbour_plan(
    index: Tensor,
    size: Tensor,
    special: Tensor,
    weight: Tensor | None,
    hidden: Tensor | None,
    residual: Tensor | None,
    remove: int,
    by_size: bool,
    axes: Sequence[int],
) -> tuple[Tensor, ...]:
    """The contract of ``neighbour_plan_reference``, for float32 streams on the CPU."""
    from mtr_lab.ops import cpu_kernels

    result = _empty_plan(index, size, special, remove)
    cpu_kernels.run(
        cpu_kernels.neighbour_plan,
        *(t.contiguous().numpy() for t in (index, size, special)),
        _NO_FACTOR if weight is None else _array(weight),
        _array(_features(hidden, residual)),
        by_size,
        np.array(axes, dtype=np.int64),
        *(t.numpy() for t in result),
    )
    return result


def asymmetric_plan(inputs: DecisionInputs) -> tuple[Tensor, ...]:
    """The result of the operator ``mtr_lab::asymmetric_plan``, for float32 streams on the CPU, one at least."""
    from mtr_lab.ops import cpu_kernels

    terms, scale, index, size, special, hidden, residual, remove, targets, by_size = inputs
    special = special.long()  # an empty list makes a tensor of floats
    result = _empty_plan(index, size, special, remove)
    cpu_kernels.run(
        cpu_kernels.asymmetric_plan, _array(terms), np.float32(scale),
        *(t.contiguous().numpy() for t in (index, size, special)), _array(_features(hidden, residual)), targets,
        by_size, *(t.numpy() for t in result),
    )  # fmt: skip
    return result


def _empty_plan(index: Tensor, size: Tensor, special: Tensor, remove: int) -> tuple[Tensor, ...]:
    """Of the fields of a plan with offsets and of its metadata: memory for what the kernels write."""
    images, length = index.shape
    kept = length - remove
    dest, keep, removed, offsets, survivors = (
        index.new_empty(images, n) for n in (length, kept, remove, kept + 1, kept)
    )
    share, sizes = size.new_empty(images, length), size.new_empty(images, kept)
    return dest, share, keep, removed, offsets, survivors, sizes, torch.empty_like(special)


def _features(hidden: Tensor | None, residual: Tensor | None) -> Tensor:
    """The sum of the streams that are given."""
    return functools.reduce(torch.add, (t for t in (hidden, residual) if t is not None))


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
    from mtr_lab.ops import cpu_kernels

    merged = hidden.shape if keep is None else (*keep.shape, hidden.shape[2])
    normed, total = hidden.new_empty(merged), torch.empty(merged)
    before = weight.new_empty(0, 0, 0) if residual is None else residual
    cpu_kernels.run(
        cpu_kernels.norm_add, _memory(hidden.contiguous()), *_lists(*lists[:3] if hidden.shape != merged else ()),
        _array(before), *_lists(*lists[3:]), _NO_POSITIONS if keep is None else keep.contiguous().numpy(),
        *(_array(t) for t in (weight, weight[:0] if bias is None else bias)), np.float32(eps),
        _memory(normed), total.numpy(),
    )  # fmt: skip
    return normed, total


def _lists(share: Tensor | None = None, *lists: Tensor | None) -> tuple[np.ndarray, ...]:
    """Of a plan: share, removed and offsets; empty without one."""
    if share is None:
        return _NO_FACTOR, _NO_POSITIONS, _NO_POSITIONS
    return _array(share), *(t.contiguous().numpy() for t in lists if t is not None)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor, index: np.ndarray, source: np.ndarray, reverse: Sequence[bool]
) -> Tensor:
    from mtr_lab.ops import cpu_kernels

    y = x.new_empty(weight.shape[0], *x.shape)
    windows = _whole(weight.shape[0], *x.shape[:2])
    cpu_kernels.run(
        cpu_kernels.conv, *_rows(x[None]), _array(weight.mT), _array(bias), index, source, np.array(reverse),
        x.shape[1], *windows, y.view(-1, x.shape[2]).numpy(),
    )  # fmt: skip
    return y


@functools.cache
def has_onednn() -> bool:
    """Whether this PyTorch has the product of oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` for float32 on the CPU without gradients, by oneDNN.

    PyTorch calls MKL, which uses half of the vector width of AMD's processors.
    """
    if not (has_onednn() and torch.backends.mkldnn.enabled and x.numel()):
        return F.linear(x, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def mamba_inner(
    xz: Tensor,
    weights: PackedWeights,
    gap: Tensor | None,
    delta_scale: Tensor | None,
    repeats: Tensor | None,
    index: Tensor | None,
    source: Tensor | None,
    reverse: Sequence[int],
    rank: int,
    states: int,
    stats: Sequence[str],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the sums, and low-rank Δ, B and C of the operator ``mtr_lab::mamba_inner``, in float32 or bfloat16.

    A few images at a time: for the convolved tokens of all images the operating system would hand out new memory at
    every call, which took a third of the time.
    """
    from mtr_lab.ops import cpu_kernels

    images, length, channels = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    directions = len(reverse)
    y = xz.new_empty(images, length, channels)
    projected = torch.empty(directions, images, length, weights.projection.shape[2])
    sums = torch.empty(directions, images, length, len(stats))
    x, z = xz.chunk(2, dim=-1)
    low_rank, b, c = weights.split(projected)
    order, flags = _raster(length, tuple(reverse)), np.array(reverse)
    taps = [_array(t) for t in (weights.conv_weight, weights.conv_bias)]
    parameters = [_array(t) for t in (weights.timescale, weights.a[:, :states], weights.d, weights.timescale_bias)]
    number = max(torch.get_num_threads(), _CACHED // (4 * directions * length * channels))
    for first in range(0, images, number):
        few = slice(first, first + number)
        positions = [_NO_POSITIONS if t is None else t[few].contiguous().numpy() for t in (index, source)]
        u = xz.new_empty(directions, min(number, images - first), length, channels)
        parts = torch.empty(-(-channels // cpu_kernels.BLOCK), *u.shape[:3], len(stats))
        cpu_kernels.run(
            cpu_kernels.conv, *_rows(x[None, few]), *taps, *positions, flags, length,
            *_whole(directions, u.shape[1], length), _memory(u.view(-1, channels)),
        )  # fmt: skip
        for g in range(directions):
            projected[g, few] = linear(u[g], weights.projection[g].T)
        cpu_kernels.run(
            cpu_kernels.scan(_terms()),
            *(part for t in (u, low_rank[:, few], b[:, few], c[:, few], z[None, few]) for part in _rows(t)),
            rank,
            *parameters,
            order,
            _NO_GAP if gap is None else _array(gap[few]),
            *(_NO_FACTOR if factor is None else _array(factor[few]) for factor in (delta_scale, repeats)),
            True,
            np.float32(scale),
            _memory(y[few]),
            _numbers(stats),
            parts.numpy(),
        )
        sums[:, few] = _add_blocks(parts)
    return y, sums, projected


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
    from mtr_lab.ops import cpu_kernels

    x, weights = x.float(), PackedWeights(*(t.float() for t in weights))
    images, length, channels = x.shape
    states, rank = weights.a.shape[1], weights.timescale.shape[1]
    position = read[:, 0].numpy()
    begin = np.stack([np.zeros_like(position), position])
    end = np.stack([position + 1, np.full_like(position, length)])
    after = (end - begin).cumsum().reshape(2, images)  # the row behind each window
    windows = begin, end, after - (end - begin)
    u = x.new_empty(images * (length + 1), channels)
    positions = [_NO_POSITIONS if t is None else t.contiguous().numpy() for t in (index, source)]
    cpu_kernels.run(
        cpu_kernels.conv, *_rows(x[None]), _array(weights.conv_weight), _array(weights.conv_bias), *positions,
        np.array([0, 1]), length, *windows, u.numpy(),
    )  # fmt: skip
    projected, delta = u.new_empty(len(u), rank + 2 * states), torch.empty_like(u)
    for g, rows in enumerate((slice(after[0, -1]), slice(after[0, -1], None))):
        projected[rows] = linear(u[rows], weights.projection[g].T)
        delta[rows] = linear(projected[rows, :rank], weights.timescale[g].T)
    y = torch.empty(z.shape)
    cpu_kernels.run(
        cpu_kernels.read, u.numpy(), delta.numpy(), projected.view(-1)[rank:].numpy(), projected.shape[1],
        *(_array(t) for t in (z[:, 0], weights.a, weights.d, weights.timescale_bias)), *windows,
        _NO_GAP if gap is None else _array(gap),
        *(_NO_FACTOR if factor is None else _array(factor) for factor in (delta_scale, repeats)),
        np.float32(scale), y[:, 0].numpy(),
    )  # fmt: skip
    return y.to(z.dtype)


def apply_plan(
    x: Tensor, dest: Tensor, weight: Tensor, keep: Tensor, removed: Tensor, offsets: Tensor | None = None
) -> Tensor:
    """The contract of ``apply_plan_reference``, for a float32 ``x`` on the CPU, and the same bits."""
    from mtr_lab.ops import cpu_kernels

    y = x.new_empty(x.shape[0], keep.shape[1], x.shape[2])
    places = (t.contiguous().numpy() for t in (dest, keep, removed))
    cpu_kernels.run(cpu_kernels.apply_plan, _array(x), _array(weight), *places, y.numpy())
    return y


def _terms() -> tuple[Callable[..., Any], ...]:
    """Of all statistics."""
    return tuple(statistic.term for statistic in STATISTICS.values())


def _numbers(stats: Sequence[str]) -> np.ndarray:
    """The places of their terms among all terms."""
    names = list(STATISTICS)
    return np.array([names.index(name) for name in stats], dtype=np.int64)


def _add_blocks(sums: Tensor) -> Tensor:
    """Sum over the first dimension, one after the other: the order in ``torch.sum`` may depend on the batch size."""
    return functools.reduce(torch.add, sums) if sums.numel() else sums[0]


@functools.lru_cache(256)
def _whole(directions: int, images: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(G, B) each: the first token of each sequence, the end of its tokens, and the row of the first in (G · B · L)."""
    start = np.arange(0, directions * images * length, length).reshape(directions, images)
    return np.zeros_like(start), np.full_like(start, length), start


@functools.lru_cache(256)
def _raster(length: int, reverse: tuple[int, ...]) -> np.ndarray:
    """(G, 1, L), the token order of each direction, or its reverse."""
    steps = np.arange(length)
    return np.stack([steps[::-1] if backward else steps for backward in reverse])[:, None]


def _array(x: Tensor) -> np.ndarray:
    return x.detach().float().contiguous().numpy()


def _memory(x: Tensor) -> np.ndarray:
    """The array of a float32 tensor, or of the bits of a bfloat16 tensor."""
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).detach().numpy()


def _rows(x: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """The flat memory from the first to the last element of (…, E), and the strides of all dimensions but the last.

    So one kernel reads contiguous tensors and slices of larger ones without a copy, and channels are contiguous.
    """
    x = x if x.dtype == torch.bfloat16 else x.float()
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.is_contiguous():
        return _memory(x.view(-1)), x.stride()[:-1]
    extent = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return _memory(x.as_strided((extent,), (1,))), x.stride()[:-1]
