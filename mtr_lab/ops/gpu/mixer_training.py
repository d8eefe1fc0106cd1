"""A mixer's training step on a GPU: the forward pass, which saves intermediate results, and the backward pass."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu import conv_backward, mixer_weights, project, scan, scan_from_states
from mtr_lab.ops.gpu.occupancy import num_sms, on_its_device, precision, product, reverse_mask
from mtr_lab.ops.gpu.scan_walk import SAVE_EVERY
from mtr_lab.ops.packed import PackedWeights
from mtr_lab.ops.statistics import STATISTICS


class Saved(NamedTuple):
    """The intermediate results that the backward pass reads."""

    u: Tensor
    """The tokens after convolution and activation, (G, B, L, E)."""
    delta: Tensor
    """Δ after bias and softplus, (G, B, L, E)."""
    ungated: Tensor
    """The sum over directions before the gate, (B, L, E)."""
    states: Tensor
    """The states before every ``SAVE_EVERY``-th position but the first, (G, B, groups - 1, N / 4, E, 4)."""


def forward(
    xz: Tensor, weights: PackedWeights, reverse: Sequence[int], stats: Sequence[str], scale: float
) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """The mixer's output and statistics.

    Args:
        xz: the output of in_proj, (B, L, 2E).
        weights: packed for the dtype of ``xz``.
        reverse: for each direction, whether it reads from the last token to the first.
        stats: in the order of ``statistics.emitted``.
        scale: factor of the output.

    Returns:
        y: (B, L, E) in the dtype of ``xz``.
        sums: the statistics, (G, B, L, len(stats)) float32.
        projected: low-rank Δ, B and C side by side, (G, B, L, R + 2N) float32.
        saved: for ``backward``.
    """
    x, z = xz.chunk(2, dim=-1)
    before_scan = [name for name in stats if not STATISTICS[name].reads_output]
    u, delta, projected, sums = project.project(x, weights, None, reverse, before_scan)
    directions, images, length, channels = u.shape
    states = weights.a.shape[1]
    num_saved = (length - 1) // SAVE_EVERY.value
    saved = Saved(
        u, delta, torch.empty_like(u[0]), u.new_empty(directions, images, num_saved, states // 4, channels, 4)
    )
    y, more = scan.scan(
        u, delta, weights.a, projected[..., -2 * states :], weights.d, z, weights.timescale_bias, None, None, None,
        reverse, stats[len(before_scan) :], softplus=False, scale=scale, saved=saved.states, ungated=saved.ungated,
    )  # fmt: skip
    return y, torch.cat([sums, more], dim=-1) if more.shape[-1] else sums, projected, saved


@on_its_device
def backward(
    xz: Tensor,
    weights: PackedWeights,
    projected: Tensor,
    saved: Saved,
    reverse: Sequence[int],
    rank: int,
    states: int,
    scale: float,
    grad: Tensor,
    projected_grad: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The gradients of ``forward``. Deterministic.

    Args:
        xz, weights, reverse, scale: as for ``forward``.
        projected, saved: its results.
        rank, states: of the parameters, without padding.
        grad: the gradient of the output, (B, L, E).
        projected_grad: the gradient of ``projected``; ``None`` for zero.

    Returns:
        The gradient of xz, and those of the parameters in float32, one tensor (G, *) for each field of
        ``MambaWeights``.
    """
    u, delta, ungated, saved_states = saved
    x, z = xz.chunk(2, dim=-1)
    dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    dx, dz = dxz.chunk(2, dim=-1)
    du, ddelta, dbc, da, dd, dbias = scan_from_states.scan_from_states(
        u, delta, weights.a, grouped(projected, weights.a.shape[1], reverse), weights.d, z, ungated, saved_states, grad,
        dz, reverse, scale,
    )  # fmt: skip
    du, ddelta = du.flatten(1, 2), ddelta.flatten(1, 2)
    dprojected = add_gradients(torch.bmm(ddelta, weights.timescale.mT), dbc.flatten(2, 3), projected_grad)
    dtimescale = weight_gradient(projected.flatten(1, 2)[..., :rank], ddelta)
    dprojection = weight_gradient(dprojected, u.flatten(1, 2))
    du.baddbmm_(dprojected, weights.projection.mT)  # in place: ``baddbmm`` would copy ``du`` first
    dconv = conv_backward.conv_backward(x, weights.conv_weight, weights.conv_bias, reverse, du.view_as(u), dx)
    parts = mixer_weights.Parts(dconv, dprojection, dtimescale, dbias, da, dd)
    return dxz, mixer_weights.add_parts(parts, weights.a, rank, states)


@triton.jit(do_not_specialize=["rows"])
def _add_gradients(low_rank, parts, more, out, rows, R: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr,
                   T: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    mask = (row < rows)[:, None]
    r, k = tl.arange(0, R), tl.arange(0, K)
    total = tl.zeros((T, K), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + (part * rows.to(tl.int64) + row)[:, None] * K + k[None, :], mask, 0)
    low = tl.load(low_rank + row[:, None] * R + r[None, :], mask, 0).to(tl.float32)
    if more is not None:
        low += tl.load(more + row[:, None] * (R + K) + r[None, :], mask, 0)
        total += tl.load(more + row[:, None] * (R + K) + R + k[None, :], mask, 0)
    tl.store(out + row[:, None] * (R + K) + r[None, :], low.to(out.dtype.element_ty), mask)
    tl.store(out + row[:, None] * (R + K) + R + k[None, :], total.to(out.dtype.element_ty), mask)


def add_gradients(low_rank: Tensor, parts: Tensor, more: Tensor | None) -> Tensor:
    """The gradient of ``projected``: its columns for the low-rank Δ, and those for B and C.

    Args:
        low_rank: the gradient of the low-rank Δ, (G, T, R); R is a power of two.
        parts: of the gradient of B and C side by side, (parts, G, T, 2N) float32; N is a power of two.
        more: a gradient of ``projected`` to add, (G, B, L, R + 2N) float32 with B · L = T, or ``None``.

    Returns:
        (G, T, R + 2N) in the dtype of ``low_rank``.
    """
    directions, tokens, rank = low_rank.shape
    columns = parts.shape[3]
    out = low_rank.new_empty(directions, tokens, rank + columns)
    rows = directions * tokens
    _add_gradients[triton.cdiv(rows, 32),](
        low_rank, parts, None if more is None else more.contiguous(), out, rows, R=rank, K=columns,
        PARTS=len(parts), T=32, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens", "share"])
def _weight_gradient(a, b, out, tokens, share, stride_a: tl.constexpr, columns: tl.constexpr, channels: tl.constexpr,
                     PRECISION: tl.constexpr, K: tl.constexpr, T: tl.constexpr, E: tl.constexpr):  # fmt: skip
    g, part = tl.program_id(2).to(tl.int64), tl.program_id(1)
    e = tl.program_id(0) * E + tl.arange(0, E)
    k = tl.arange(0, K)
    a += g * tokens * stride_a
    b += g * tokens * channels
    total = tl.zeros((K, E), tl.float32)
    end = tl.minimum((part + 1) * share, tokens)
    for first in range(part * share, end, T):
        t = first + tl.arange(0, T)
        x = tl.load(a + t[None, :] * stride_a + k[:, None], (t < end)[None, :] & (k < columns)[:, None], 0)
        y = tl.load(b + t[:, None] * channels + e[None, :], (t < end)[:, None] & (e < channels)[None, :], 0)
        total = product(x.to(y.dtype), y, total, PRECISION)
    at = (tl.num_programs(2) * part + g) * columns
    tl.store(out + (at + k[:, None]) * channels + e[None, :], total, (k < columns)[:, None] & (e < channels)[None, :])


def weight_gradient(a: Tensor, b: Tensor) -> Tensor:
    """Parts of the product aᵀ b for small K and large T: (G, T, K), (G, T, E) -> (parts, G, K, E) float32.

    Programs share the T tokens. cuBLAS has no kernel as fast for this shape.

    Args:
        a: rows contiguous and evenly spaced.
        b: contiguous.
    """
    directions, tokens, columns = a.shape
    channels = b.shape[2]
    blocks = triton.cdiv(channels, 64)
    parts = max(1, min(4 * num_sms(b.device) // (blocks * directions), triton.cdiv(tokens, 64)))
    share = triton.cdiv(triton.cdiv(tokens, parts), 64) * 64
    parts = triton.cdiv(tokens, share)
    out = b.new_empty(parts, directions, columns, channels, dtype=torch.float32)
    _weight_gradient[blocks, parts, directions](
        a, b, out, tokens, share, a.stride(1), columns, channels, PRECISION=precision(b.dtype),
        K=max(16, triton.next_power_of_2(columns)), T=64, E=64, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["length", "images"])
def _grouped(projected, out, images, length, reverse, stride: tl.constexpr, NP: tl.constexpr, U: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    back = (reverse >> (tl.program_id(1) // images)) & 1
    group = tl.program_id(0)
    j, column = tl.arange(0, U), tl.arange(0, 2 * NP)
    s = tl.maximum(tl.minimum(group * U, length - U), 0) + j
    t = tl.where(back == 1, length - 1 - s, s)
    at = projected + (row * length + t)[:, None] * stride + (stride - 2 * NP + column)[None, :]
    x = tl.load(at, (s < length)[:, None], 0)
    first = (row * tl.num_programs(0) + group) * (2 * NP * U) + (column % NP * 2 + column // NP)[None, :] * U
    tl.store(out + first + j[:, None], x)


def grouped(projected: Tensor, states: int, reverse: Sequence[int]) -> Tensor:
    """B and C in the layout of ``scan_from_states``.

    Args:
        projected: low-rank Δ, B and C side by side, (G, B, L, R + 2N).
        states: N, a power of two.

    Returns:
        (G, B, groups, N, 2, SAVE_EVERY) in reading order, 0 past the end. The last group ends with the last position.
    """
    directions, images, length, columns = projected.shape
    size = SAVE_EVERY.value
    groups = triton.cdiv(length, size)
    out = projected.new_empty(directions, images, groups, states, 2, size)
    _grouped[groups, directions * images](
        projected.contiguous(), out, images, length, reverse_mask(reverse), columns, NP=states, U=size, num_warps=1
    )
    return out
