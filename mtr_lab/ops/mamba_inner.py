"""What a block does between its two big projections, as one operation: for inference on a GPU.

It computes what ``causal_conv1d``, the projections to the low rank, B, C and Δ, and ``selective_scan`` compute one
after the other, with fewer passes over memory and with the parameters laid out once.
"""

from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.ops import backend
from mtr_lab.ops.causal_conv1d import causal_conv1d_flops
from mtr_lab.ops.selective_scan import STATS, selective_scan_flops


class Layout(NamedTuple):
    """The parameters of a block's G directions as the kernels read them. R and N are padded with zeros."""

    conv_weight: Tensor
    """(G, W, E) float32."""
    conv_bias: Tensor
    """(G, E) float32."""
    projection: Tensor
    """(G, E, R + 2N) in the model's dtype: the low rank, R a power of two from 16 on, B, then C, N one from 8 on."""
    timescale: Tensor
    """(G, R, E) in the model's dtype."""
    timescale_bias: Tensor
    """(G, E) float32."""
    a: Tensor
    """(G, N, E) float32, negative, 0 where padded."""
    d: Tensor
    """(G, E) float32."""

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., R + 2N) -> the low rank, B and C."""
        states = self.a.shape[1]
        return projected.split([projected.shape[-1] - 2 * states, states, states], dim=-1)


def lay_out(
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dtype: torch.dtype,
) -> Layout:
    """Copy the parameters, stacked over G directions, into the kernels' layout for data of ``dtype``.

    Args:
        conv_weight: (G, E, W); ``conv_bias``, ``dt_bias`` and ``D`` (G, E).
        x_proj: (G, R + 2N, E), the rows of the low rank first, then B, then C.
        dt_proj: (G, E, R).
        A: (G, E, N), negative.
    """
    states, rank = A.shape[2], dt_proj.shape[2]
    more_rank, more_states = max(16, _power_of_2(rank)) - rank, max(8, _power_of_2(states)) - states
    low_rank, b, c = x_proj.transpose(1, 2).split([rank, states, states], dim=2)
    return Layout(
        conv_weight.float().transpose(1, 2).contiguous(),
        conv_bias.float().contiguous(),
        torch.cat([F.pad(low_rank, (0, more_rank)), *(F.pad(t, (0, more_states)) for t in (b, c))], dim=2).to(dtype),
        F.pad(dt_proj.transpose(1, 2), (0, 0, 0, more_rank)).to(dtype).contiguous(),
        dt_bias.float().contiguous(),
        F.pad(A.float().transpose(1, 2), (0, 0, 0, more_states)).contiguous(),
        D.float().contiguous(),
    )


def fuses(data: Tensor) -> bool:
    """Whether ``mamba_inner`` runs on this data: on a GPU, where no gradient can be asked for."""
    return not torch.is_grad_enabled() and backend.pick(data) == "triton"


def mamba_inner(
    xz: Tensor,
    layout: Layout,
    *,
    rank: int,
    states: int,
    reverse: Sequence[bool],
    gap: Tensor | None = None,
    stretch: Tensor | None = None,
    stats: Sequence[str] = (),
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Convolve, project and scan all directions, skip and gate included.

    Args:
        xz: the input projection, (B, L, 2E): tokens, then their gate.
        layout: the parameters, by ``lay_out``.
        rank, states: of the model, without the layout's padding.
        reverse, gap, stretch, stats: as in ``selective_scan``.
        scale: the result is multiplied by it.

    Returns:
        y: (B, L, E) in the dtype of ``xz``.
        sums: (G, B, L, len(stats)) float32, in the order asked.
        b, c: (G, B, L, N) float32, the input and output projections.
    """
    wanted, order = [name in stats for name in STATS], [int(r) for r in reverse]
    y, sums, projected = _mamba_inner(xz, *layout, gap, stretch, order, rank, states, *wanted, scale)
    emitted = [name for name in STATS if name in stats]
    if emitted != list(stats):
        sums = sums[..., [emitted.index(name) for name in stats]]
    _, b, c = layout.split(projected)
    return y, sums, b[..., :states], c[..., :states]


@torch.library.custom_op("mtr_lab::mamba_inner", mutates_args=())
def _mamba_inner(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    projection: Tensor,
    timescale: Tensor,
    timescale_bias: Tensor,
    a: Tensor,
    d: Tensor,
    gap: Optional[Tensor],
    stretch: Optional[Tensor],
    reverse: Sequence[int],
    rank: int,
    states: int,
    with_delta: bool,
    with_write: bool,
    with_output: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from mtr_lab.ops.gpu import project, scan

    x, z = xz.chunk(2, dim=-1)
    layout = Layout(conv_weight, conv_bias, projection, timescale, timescale_bias, a, d)
    u, delta, projected, sums = project.project(x, layout, stretch, reverse, with_delta, with_write)
    y, output = scan.scan(
        u, delta, a, projected[..., -2 * a.shape[1] :], d, z, timescale_bias, gap, None, reverse,
        softplus=False, sums=False, output=with_output, scale=scale,
    )  # fmt: skip
    if with_output:
        sums = torch.cat([sums, output[..., 2:]], dim=-1)
    return y, sums, projected


@_mamba_inner.register_fake
def _(  # type: ignore[no-untyped-def]
    xz, conv_weight, conv_bias, projection, timescale, timescale_bias, a, d, gap, stretch, reverse, rank, states,
    with_delta, with_write, with_output, scale
):  # fmt: skip
    images, length, channels = xz.shape
    rows = (len(reverse), images, length)
    sums = xz.new_empty(*rows, with_delta + with_write + with_output, dtype=torch.float32)
    projected = xz.new_empty(*rows, projection.shape[2], dtype=torch.float32)
    return xz.new_empty(images, length, channels // 2), sums, projected


@register_flop_formula(torch.ops.mtr_lab.mamba_inner)
def mamba_inner_flops(  # type: ignore[no-untyped-def]
    xz_shape, conv_shape, conv_bias, projection, timescale, timescale_bias, a, d, gap, stretch, reverse, rank, states,
    *args, out_shape=None, **kwargs
) -> int:  # fmt: skip
    """The convolution's, the scan's, and 2 a multiply-accumulate of the projections, padding left out."""
    directions, width, channels = conv_shape
    images, length, _ = xz_shape
    rows = directions * images * length
    return (
        causal_conv1d_flops((images, length, channels), (directions, channels, width))
        + 2 * rows * channels * (rank + 2 * states + rank)
        + selective_scan_flops((directions, images, length, channels), None, (directions, channels, states))
    )


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
