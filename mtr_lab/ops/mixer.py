"""The Mamba mixer without in_proj and out_proj: convolution, projections and scan as one operation.

For inference on a GPU it is fused into fewer passes over memory, with parameters that are packed once.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.ops import cpu
from mtr_lab.ops.convolution import causal_conv1d, causal_conv1d_flops, causal_conv1d_reference
from mtr_lab.ops.convolution_unmerged import causal_conv1d_unmerged_reference
from mtr_lab.ops.mixer_training import fills_gpu, mamba_inner_training
from mtr_lab.ops.packed import MambaWeights, PackedCache, PackedWeights, pack, stacked
from mtr_lab.ops.registry import Implementation, Operation, operator
from mtr_lab.ops.scan import selective_scan, selective_scan_flops
from mtr_lab.ops.scan_inputs import ScanInputs
from mtr_lab.ops.scan_portable import selective_scan_portable
from mtr_lab.ops.statistics import STATISTICS, as_asked, emitted


def mamba_inner(
    xz: Tensor,
    weights: MambaWeights,
    *,
    reverse: Sequence[bool],
    order: Tensor | None = None,
    gap: Tensor | None = None,
    delta_scale: Tensor | None = None,
    repeats: Tensor | None = None,
    index: Tensor | None = None,
    source: Tensor | None = None,
    stats: Sequence[str] = (),
    scale: float = 1.0,
    packed: PackedCache | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Convolve, project and scan all directions, skip and gate included. Differentiable in ``xz`` and ``weights``.

    Args:
        xz: the output of in_proj, (B, L, 2E): tokens, then their gate.
        weights: the parameters of the G directions.
        reverse, order, gap, delta_scale, repeats, stats: as in ``selective_scan``. The convolution reads tokens in
            their order or in reverse, not in ``order``.
        index, source: as in ``causal_conv1d``: the convolution runs over the original positions of the tokens.
        scale: factor of the result.
        packed: cache of the packed weights; without it they are packed at every call. A pass without the kernels
            clears it: a fused optimizer may update parameters without bumping their versions.

    Returns:
        y: (B, L, E) in the dtype of ``xz``.
        sums: (G, B, L, len(stats)) float32 (float64 for float64), in the order of ``stats``.
        b, c: (G, B, L, N), the input and output projections: float32 from the kernels, else in the dtype of ``xz``.

    Raises:
        UserError: as ``selective_scan``.
    """
    scanned = {"reverse": reverse, "order": order, "gap": gap, "delta_scale": delta_scale, "repeats": repeats}
    return MAMBA_INNER(xz, weights, packed, scale, index=index, source=source, stats=stats, **scanned)


def _composed(
    xz: Tensor,
    weights: MambaWeights,
    packed: PackedCache | None,
    scale: float,
    *,
    reverse: Sequence[bool],
    index: Tensor | None = None,
    source: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One operation after the other."""
    if packed is not None:
        packed.clear()
    x, z = xz.chunk(2, dim=-1)
    conv = stacked(weights.conv_weight).squeeze(2), stacked(weights.conv_bias)
    u = causal_conv1d(x, *conv, reverse=reverse, index=index, source=source)
    x_proj, dt_proj = stacked(weights.x_proj).transpose(1, 2), stacked(weights.dt_proj).transpose(1, 2)
    delta, _, b, c = project(u, x_proj, dt_proj, weights.states)
    D, bias = stacked(weights.D), stacked(weights.dt_bias)
    y, sums = selective_scan(u, delta, weights.A, b, c, D, z=z, delta_bias=bias, reverse=reverse, **options)
    return y if scale == 1 else y * scale, sums, b, c


def project(u: Tensor, x_proj: Tensor, dt_proj: Tensor, states: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u (G, B, L, E), weights (G, E, R + 2N) and (G, R, E) -> Δ before bias; low-rank Δ, B and C side by side; B; C."""
    rank = dt_proj.shape[1]
    projected = torch.bmm(u.flatten(1, 2), x_proj)
    low_rank, b, c = projected.split([rank, states, states], dim=-1)
    delta = torch.bmm(low_rank, dt_proj)
    b, c = (t.view(*u.shape[:3], states) for t in (b, c))
    return delta.view_as(u), projected, b, c


def _fused(
    xz: Tensor,
    weights: MambaWeights,
    packed: PackedCache | None,
    scale: float,
    *,
    implementation: str,
    reverse: Sequence[bool],
    order: None,
    gap: Tensor | None,
    delta_scale: Tensor | None,
    repeats: Tensor | None,
    index: Tensor | None,
    source: Tensor | None,
    stats: Sequence[str],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kernels of a CPU or in ``mtr_lab.ops.gpu``, on packed weights."""
    if torch.is_grad_enabled():
        if packed is not None:
            packed.clear()
        differentiable = partial(_differentiable, scale=scale, reverse=reverse)
        return mamba_inner_training(xz, weights, differentiable, reverse=reverse, stats=stats, scale=scale)
    kernel_weights = pack(weights, xz.dtype) if packed is None else packed.get(weights, xz.dtype)
    names, directions = " ".join(emitted(stats)), [int(r) for r in reverse]
    rank, states = weights.rank, weights.states
    positions = gap, delta_scale, repeats, index, source
    y, sums, projected = _mamba_inner(
        xz, *kernel_weights, *positions, directions, rank, states, names, scale, implementation
    )
    _, b, c = kernel_weights.split(projected)
    return y, as_asked(sums, stats), b[..., :states], c[..., :states]


def _differentiable(
    xz: Tensor, weights: MambaWeights, *, scale: float, reverse: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, B and C of ``_composed``."""
    y, _, b, c = _composed(xz, weights, None, scale, reverse=reverse)
    return y, b, c


def _unfit(
    xz: Tensor,
    weights: MambaWeights,
    *inputs: Any,
    order: Tensor | None,
    gap: Tensor | None,
    delta_scale: Tensor | None,
    repeats: Tensor | None,
    source: Tensor | None,
    **options: Any,
) -> str:
    if order is not None:
        return "reads tokens in their order or backwards"
    if not torch.is_grad_enabled():
        return ""
    if any(t is not None for t in (gap, delta_scale, repeats, source)) or torch.compiler.is_compiling():
        return "has no gradient of the fused mixer for gaps, delta_scale, repeats or source, or in a compiled graph"
    if not fills_gpu(xz):
        return "leaves the GPU partly idle with few images"
    return ""


def _unfit_for_cpu(*inputs: Any, order: Tensor | None, **options: Any) -> str:
    if order is not None:
        return "reads tokens in their order or backwards"
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "has no gradient of the fused mixer, and none in a graph"
    return ""


MAMBA_INNER = Operation(
    "mamba_inner",
    [
        Implementation("triton", partial(_fused, implementation="triton"), unfit=_unfit, package="triton"),
        Implementation("cpu", partial(_fused, implementation="cpu"), unfit=_unfit_for_cpu, more=(torch.bfloat16,)),
        Implementation("reference", _composed),
    ],
)


def _run_kernels(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    if arguments[-1] == "cpu":
        return cpu.mamba_inner(*_unpack(*arguments))
    from mtr_lab.ops.gpu import project, scan

    xz, weights, gap, delta_scale, repeats, index, source, reverse, _, _, stats, scale = _unpack(*arguments)
    before_scan = [name for name in stats if not STATISTICS[name].reads_output]
    x, z = xz.chunk(2, dim=-1)
    inside = not before_scan and scan.computes_deltas(x)
    if inside:
        u, projected = project.convolve(x, weights, reverse, index, source)
        delta, sums = None, projected.new_empty(*u.shape[:3], 0)
    else:
        u, delta, projected, sums = project.project(
            x, weights, delta_scale, reverse, before_scan, repeats=repeats, index=index, source=source
        )
    y, more = scan.scan(
        u, delta, weights.a, projected[..., -2 * weights.a.shape[1] :], weights.d, z, weights.timescale_bias, None, gap,
        delta_scale if inside else None, reverse, stats[len(before_scan) :], softplus=inside, scale=scale,
        repeats=repeats, timescale=weights.timescale if inside else None,
    )  # fmt: skip
    return y, torch.cat([sums, more], dim=-1) if more.shape[-1] else sums, projected


def _unpack(*arguments: Any) -> tuple[Any, ...]:
    """The operator's arguments as xz, packed weights, those from gap to states, names of statistics, scale."""
    xz, *weights = arguments[:8]
    *positions, names, scale, _ = arguments[8:]
    return xz, PackedWeights(*weights), *positions, names.split(), scale


def _in_plain_pytorch(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels' function on packed weights; padded states stay zero."""
    xz, weights, gap, delta_scale, repeats, index, source, reverse, _, _, stats, scale = _unpack(*arguments)
    x, z = xz.chunk(2, dim=-1)
    conv = weights.conv_weight.transpose(1, 2), weights.conv_bias
    if source is None:
        u = causal_conv1d_reference(x, *conv, reverse)
    else:
        u = causal_conv1d_unmerged_reference(x, *conv, index, source, reverse)
    delta, projected, b, c = project(u, weights.projection, weights.timescale, weights.a.shape[1])
    inputs = (u, delta, weights.a.transpose(1, 2), b, c, weights.d, z, weights.timescale_bias, None, gap)
    y, sums = selective_scan_portable(ScanInputs(*inputs, delta_scale, repeats, tuple(reverse)), stats)
    return y * scale, sums.float(), projected.view(*u.shape[:3], -1).float()


def _like_result(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    xz, weights, *_, reverse, _, _, stats, _ = _unpack(*arguments)
    images, length, channels = xz.shape
    rows = (len(reverse), images, length)
    sums = xz.new_empty(*rows, len(stats), dtype=torch.float32)
    projected = xz.new_empty(*rows, weights.projection.shape[2], dtype=torch.float32)
    return xz.new_empty(images, length, channels // 2), sums, projected


_mamba_inner = operator(
    "mamba_inner",
    "(Tensor xz, Tensor conv_weight, Tensor conv_bias, Tensor projection, Tensor timescale, Tensor timescale_bias, "
    "Tensor a, Tensor d, Tensor? gap, Tensor? delta_scale, Tensor? repeats, Tensor? index, Tensor? source, "
    "int[] reverse, int rank, int states, str stats, float scale, str implementation) -> (Tensor, Tensor, Tensor)",
    run=_run_kernels,
    fake=_like_result,
    decomposition=_in_plain_pytorch,
)


@register_flop_formula(torch.ops.mtr_lab.mamba_inner)
def mamba_inner_flops(  # type: ignore[no-untyped-def]
    xz_shape, conv_shape, conv_bias, projection, timescale, timescale_bias, a, d, gap, delta_scale, repeats,
    index, source, reverse, rank, states, *args, out_shape=None, **kwargs
) -> int:  # fmt: skip
    """Those of convolution and scan, and 2 for each multiply-accumulate of the projections, padding not counted."""
    directions, width, channels = conv_shape
    images, length, _ = xz_shape
    return (
        causal_conv1d_flops((images, length, channels), (directions, channels, width))
        + _projection_flops(xz_shape, conv_shape, rank, states)
        + selective_scan_flops(
            (directions, images, length, channels), None, (directions, channels, states), *(None,) * 8, repeats
        )
    )


@register_flop_formula(torch.ops.mtr_lab.mamba_inner_training)
def mamba_inner_training_flops(xz_shape, conv_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """Those of ``mamba_inner``."""
    *packed, reverse, rank, states, _, _ = args
    return mamba_inner_flops(xz_shape, conv_shape, *packed, *(None,) * 5, reverse, rank, states)


@register_flop_formula(torch.ops.mtr_lab.mamba_inner_training_backward)
def mamba_inner_training_backward_flops(xz_shape, conv_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """Two products for each projection. As for the separate operations, convolution and scan are not counted."""
    *_, rank, states, _ = args
    return 2 * _projection_flops(xz_shape, conv_shape, rank, states)


def _projection_flops(xz_shape, conv_shape, rank: int, states: int) -> int:  # type: ignore[no-untyped-def]
    """Those of x_proj and dt_proj, unpadded."""
    directions, _, channels = conv_shape
    images, length, _ = xz_shape
    return 2 * directions * images * length * channels * (rank + 2 * states + rank)
