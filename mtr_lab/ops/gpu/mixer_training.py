"""The kernels of a mixer's training step: what its forward pass keeps, and the backward pass that reads it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu import conv_backward, project, scan, scan_from_states
from mtr_lab.ops.gpu.launch import on_its_device, reverse_mask
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
    """Of the scan, before every ``KEPT``-th token but the first, (G, B, groups - 1, N, E)."""


def forward(
    xz: Tensor, weights: PackedWeights, reverse: Sequence[int], stats: Sequence[str], scale: float
) -> tuple[Tensor, Tensor, Tensor, Kept]:
    """Output (B, L, E), statistics, low rank, B and C side by side (G, B, L, R + 2N) float32, and what is kept."""
    x, z = xz.chunk(2, dim=-1)
    known = [name for name in stats if not STATISTICS[name].reads_output]
    u, delta, projected, sums = project.project(x, weights, None, reverse, known)
    directions, images, length, channels = u.shape
    states = weights.a.shape[1]
    between = (length - 1) // scan.KEPT.value
    kept = Kept(u, delta, torch.empty_like(u[0]), u.new_empty(directions, images, between, states, channels))
    y, more = scan.scan(
        u, delta, weights.a, projected[..., -2 * states :], weights.d, z, weights.timescale_bias, None, None, None,
        reverse, stats[len(known) :], softplus=False, scale=scale, kept=kept.states, ungated=kept.ungated,
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
    directions, images, length, channels = u.shape
    x, z = xz.chunk(2, dim=-1)
    dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    dx, dz = dxz.chunk(2, dim=-1)
    du, ddelta, dbc, da, dd, dbias = scan_from_states.scan_from_states(
        u, delta, weights.a, in_groups(projected, weights.a.shape[1], reverse), weights.d, z, ungated, states, grad,
        dz, reverse, scale,
    )  # fmt: skip
    rank = weights.timescale.shape[1]
    du, ddelta = du.flatten(1, 2), ddelta.flatten(1, 2)
    total = torch.cat([torch.bmm(ddelta, weights.timescale.mT), dbc.sum(0).flatten(1, 2).to(u.dtype)], dim=-1)
    if projected_grad is not None:
        total += projected_grad.flatten(1, 2)
    low_rank = projected[..., :rank].flatten(1, 2).to(u.dtype)
    dtimescale = _sums(ddelta.mT, low_rank)
    dprojection = _sums(total.mT, u.flatten(1, 2))
    du = torch.baddbmm(du, total, weights.projection.mT)
    dweight, dconv_bias = conv_backward.conv_backward(
        x, weights.conv_weight, weights.conv_bias, reverse, du.view_as(u), dx
    )
    return dxz, PackedWeights(dweight, dconv_bias, dprojection, dtimescale, dbias.sum(1), da.sum(1), dd.sum(1))


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """(G, K, T) @ (G, T, M) in float32."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else a.float() @ b.float()


@triton.jit(do_not_specialize=["length", "images"])
def _in_groups(projected, out, images, length, reverse, step: tl.constexpr, NP: tl.constexpr, U: tl.constexpr):
    each = tl.program_id(1).to(tl.int64)
    back = (reverse >> (tl.program_id(1) // images)) & 1
    group = tl.program_id(0)
    j, column = tl.arange(0, U), tl.arange(0, 2 * NP)
    s = group * U + j
    t = tl.where(back == 1, length - 1 - s, s)
    at = projected + (each * length + t)[:, None] * step + (step - 2 * NP + column)[None, :]
    x = tl.load(at, (s < length)[:, None], 0)
    into = (each * tl.num_programs(0) + group) * (2 * NP * U) + (column % NP * 2 + column // NP)[None, :] * U
    tl.store(out + into + j[:, None], x)


def in_groups(projected: Tensor, states: int, reverse: Sequence[int]) -> Tensor:
    """B and C at the end of (G, B, L, R + 2N) -> (G, B, groups, N, 2, KEPT), in the reading order, 0 past the end."""
    directions, images, length, columns = projected.shape
    tokens = scan.KEPT.value
    groups = triton.cdiv(length, tokens)
    out = projected.new_empty(directions, images, groups, states, 2, tokens)
    _in_groups[groups, directions * images](
        projected.contiguous(), out, images, length, reverse_mask(reverse), columns, NP=states, U=tokens, num_warps=1
    )
    return out
