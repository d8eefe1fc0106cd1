"""The kernels of a mixer's training step: what its forward pass keeps, and the backward pass that reads it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu import conv_backward, project, scan, scan_from_states, scan_walk
from mtr_lab.ops.gpu.occupancy import num_sms, on_its_device, precision, product, reverse_mask
from mtr_lab.ops.packed import PackedWeights
from mtr_lab.ops.statistics import STATISTICS


class Kept(NamedTuple):
    """What the backward pass reads of the forward pass, beside its inputs."""

    u: Tensor
    """After convolution and activation, (G, B, L, E)."""
    delta: Tensor
    """After softplus, (G, B, L, E)."""
    ungated: Tensor
    """The directions' sum before the gate, (B, L, E)."""
    states: Tensor
    """Of the scan, before every ``SAVE_EVERY``-th token but the first, (G, B, groups - 1, N, E)."""


def forward(
    xz: Tensor, weights: PackedWeights, reverse: Sequence[int], stats: Sequence[str], scale: float
) -> tuple[Tensor, Tensor, Tensor, Kept]:
    """Output (B, L, E), statistics, low rank, B and C side by side (G, B, L, R + 2N) float32, and what is kept."""
    x, z = xz.chunk(2, dim=-1)
    before_scan = [name for name in stats if not STATISTICS[name].reads_output]
    u, delta, projected, sums = project.project(x, weights, None, reverse, before_scan)
    directions, images, length, channels = u.shape
    states = weights.a.shape[1]
    saved_states = (length - 1) // scan_walk.SAVE_EVERY.value
    kept = Kept(u, delta, torch.empty_like(u[0]), u.new_empty(directions, images, saved_states, states, channels))
    y, more = scan.scan(
        u, delta, weights.a, projected[..., -2 * states :], weights.d, z, weights.timescale_bias, None, None, None,
        reverse, stats[len(before_scan) :], softplus=False, scale=scale, saved=kept.states, ungated=kept.ungated,
    )  # fmt: skip
    return y, torch.cat([sums, more], dim=-1) if more.shape[-1] else sums, projected, kept


@on_its_device
def backward(
    xz: Tensor,
    weights: PackedWeights,
    projected: Tensor,
    kept: Kept,
    reverse: Sequence[int],
    scale: float,
    grad: Tensor,
    projected_grad: Tensor | None,
) -> tuple[Tensor, PackedWeights]:
    """The gradients of ``forward``.

    Args:
        grad: the gradient of the output, (B, L, E); ``projected_grad`` that of ``projected`` if there is one.

    Returns:
        The gradient of xz, and those of the weights, of which float32 sums of (G, R + 2N, E) and (G, E, R) stand for
        ``projection`` and ``timescale``.
    """
    u, delta, ungated, states = kept
    x, z = xz.chunk(2, dim=-1)
    dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    dx, dz = dxz.chunk(2, dim=-1)
    du, ddelta, dbc, da, dd, dbias = scan_from_states.scan_from_states(
        u, delta, weights.a, in_groups(projected, weights.a.shape[1], reverse), weights.d, z, ungated, states, grad,
        dz, reverse, scale,
    )  # fmt: skip
    rank = weights.timescale.shape[1]
    du, ddelta = du.flatten(1, 2), ddelta.flatten(1, 2)
    total = assemble(torch.bmm(ddelta, weights.timescale.mT), dbc.flatten(2, 3), projected_grad)
    dtimescale = weight_gradient(projected.flatten(1, 2)[..., :rank], ddelta).mT
    dprojection = weight_gradient(total, u.flatten(1, 2))
    du.baddbmm_(total, weights.projection.mT)
    dweight, dconv_bias = conv_backward.conv_backward(
        x, weights.conv_weight, weights.conv_bias, reverse, du.view_as(u), dx
    )
    return dxz, PackedWeights(dweight, dconv_bias, dprojection, dtimescale, dbias.sum(1), da.sum(1), dd.sum(1))


@triton.jit(do_not_specialize=["rows"])
def _assemble(low_rank, parts, more, out, rows, R: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr,
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


def assemble(low_rank: Tensor, parts: Tensor, more: Tensor | None) -> Tensor:
    """The gradient of low rank, B and C side by side.

    Args:
        low_rank: (G, T, R); R a power of two.
        parts: what programs have summed up for B and C, (parts, G, T, 2N) float32; N a power of two.
        more: what else arrives, (G, B, L, R + 2N) float32 with B · L = T.

    Returns:
        (G, T, R + 2N) in the dtype of ``low_rank``.
    """
    directions, tokens, rank = low_rank.shape
    columns = parts.shape[3]
    out = low_rank.new_empty(directions, tokens, rank + columns)
    rows = directions * tokens
    _assemble[triton.cdiv(rows, 32),](
        low_rank, parts, None if more is None else more.contiguous(), out, rows, R=rank, K=columns,
        PARTS=len(parts), T=32, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens", "share"])
def _weight_gradient(a, b, out, tokens, share, step_a: tl.constexpr, columns: tl.constexpr, channels: tl.constexpr,
                     PRECISION: tl.constexpr, K: tl.constexpr, T: tl.constexpr, E: tl.constexpr):  # fmt: skip
    g, part = tl.program_id(2).to(tl.int64), tl.program_id(1)
    e = tl.program_id(0) * E + tl.arange(0, E)
    k = tl.arange(0, K)
    a += g * tokens * step_a
    b += g * tokens * channels
    total = tl.zeros((K, E), tl.float32)
    end = tl.minimum((part + 1) * share, tokens)
    for first in range(part * share, end, T):
        t = first + tl.arange(0, T)
        x = tl.load(a + t[None, :] * step_a + k[:, None], (t < end)[None, :] & (k < columns)[:, None], 0)
        y = tl.load(b + t[:, None] * channels + e[None, :], (t < end)[:, None] & (e < channels)[None, :], 0)
        total = product(x.to(y.dtype), y, total, PRECISION)
    at = (tl.num_programs(2) * part + g) * columns
    tl.store(out + (at + k[:, None]) * channels + e[None, :], total, (k < columns)[:, None] & (e < channels)[None, :])


def weight_gradient(a: Tensor, b: Tensor) -> Tensor:
    """(G, T, K) and (G, T, E) -> the sums of a · b over the T tokens, (G, K, E) float32.

    K is small and T large: programs share the tokens, for which the library has no kernel as fast.
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
    return out.sum(0)


@triton.jit(do_not_specialize=["length", "images"])
def _in_groups(projected, out, images, length, reverse, step: tl.constexpr, NP: tl.constexpr, U: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    back = (reverse >> (tl.program_id(1) // images)) & 1
    group = tl.program_id(0)
    j, column = tl.arange(0, U), tl.arange(0, 2 * NP)
    s = group * U + j
    t = tl.where(back == 1, length - 1 - s, s)
    at = projected + (row * length + t)[:, None] * step + (step - 2 * NP + column)[None, :]
    x = tl.load(at, (s < length)[:, None], 0)
    into = (row * tl.num_programs(0) + group) * (2 * NP * U) + (column % NP * 2 + column // NP)[None, :] * U
    tl.store(out + into + j[:, None], x)


def in_groups(projected: Tensor, states: int, reverse: Sequence[int]) -> Tensor:
    """B and C, the last 2N of (G, B, L, R + 2N) -> (G, B, groups, N, 2, SAVE_EVERY) in reading order, padded with 0."""
    directions, images, length, columns = projected.shape
    tokens = scan_walk.SAVE_EVERY.value
    groups = triton.cdiv(length, tokens)
    out = projected.new_empty(directions, images, groups, states, 2, tokens)
    _in_groups[groups, directions * images](
        projected.contiguous(), out, images, length, reverse_mask(reverse), columns, NP=states, U=tokens, num_warps=1
    )
    return out
