"""What a mixer does between its two big projections, in a training step on a GPU, as one operation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtr_lab.ops.packed import MambaWeights, PackedWeights, pack
from mtr_lab.ops.statistics import as_asked, emitted
from mtr_lab.ops.vjp import vjp

Composed = Callable[[Tensor, MambaWeights], tuple[Tensor, Tensor, Tensor]]


def mamba_inner_training(
    xz: Tensor,
    weights: MambaWeights,
    composed: Composed,
    *,
    reverse: Sequence[bool],
    stats: Sequence[str],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``mamba_inner`` for data on a GPU without order, gap and delta_scale, with few launches in both passes.

    Args:
        composed: ``(xz, weights) -> y, b, c`` in differentiable operations, for gradients to be differentiated again.
    """
    names, directions = emitted(stats), [int(r) for r in reverse]
    parameters = [p for field in weights for p in ([field] if isinstance(field, Tensor) else field)]
    with torch.no_grad():
        packed = pack(weights, xz.dtype)
    lengths = [None if isinstance(field, Tensor) else len(field) for field in weights]
    y, sums, projected = _Mixer.apply(xz, packed, composed, directions, names, scale, lengths, *parameters)
    _, b, c = packed.split(projected)
    return y, as_asked(sums, stats), b[..., : weights.states], c[..., : weights.states]


def fills(xz: Tensor) -> bool:
    """Whether images and channels are enough for two scans of 64 channels a multiprocessor, of a GPU."""
    if not xz.is_cuda:
        return True
    scans = xz.shape[0] * -(-xz.shape[2] // 128)  # xz has twice the channels
    return scans >= 2 * torch.cuda.get_device_properties(xz.device).multi_processor_count


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        xz: Tensor,
        packed: PackedWeights,
        composed: Composed,
        reverse: list[int],
        stats: list[str],
        scale: float,
        lengths: list[int | None],
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from mtr_lab.ops.gpu import mixer_training

        y, sums, projected, kept = mixer_training.forward(xz, packed, reverse, stats, scale)
        ctx.composed, ctx.reverse, ctx.scale, ctx.lengths = composed, reverse, scale, lengths
        ctx.save_for_backward(xz, projected, *packed, *kept, *parameters)
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        return y, sums, projected

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None, projected_grad: Tensor | None) -> tuple[Any, ...]:
        from mtr_lab.ops.gpu import mixer_training

        xz, projected, *rest = ctx.saved_tensors
        packed, kept, parameters = PackedWeights(*rest[:7]), mixer_training.Kept(*rest[7:11]), rest[11:]
        weights = _grouped(parameters, ctx.lengths)
        if torch.is_grad_enabled():
            recorded = _composed_gradients(ctx, xz, projected, packed, grad, projected_grad, parameters)
            return recorded[0], *(None,) * 6, *recorded[1:]
        if grad is None:
            grad = torch.zeros_like(xz[..., : xz.shape[-1] // 2])
        dxz, packed_grads = mixer_training.backward(
            xz, packed, projected, kept, ctx.reverse, ctx.scale, grad, projected_grad
        )
        grads = _unpacked(packed_grads, weights)
        return dxz, *(None,) * 6, *(g.to(p.dtype) for g, p in zip(grads, parameters, strict=True))


def _grouped(parameters: Sequence[Tensor], lengths: Sequence[int | None]) -> MambaWeights:
    """The parameters in a row as the fields they came from."""
    remaining = iter(parameters)
    return MambaWeights(*(next(remaining) if n is None else [next(remaining) for _ in range(n)] for n in lengths))


def _unpacked(grads: PackedWeights, weights: MambaWeights) -> list[Tensor]:
    """Gradients as ``mixer_training.backward`` gives them -> of every parameter, in a row."""
    rank, states = weights.rank, weights.states
    low_rank, b, c = grads.projection.split(
        [grads.timescale.shape[2], grads.a.shape[1], grads.a.shape[1]], dim=1
    )  # (G, R + 2N, E), padded
    fields: dict[str, Tensor] = {
        "conv_weight": grads.conv_weight.mT[:, :, None],
        "conv_bias": grads.conv_bias,
        "x_proj": torch.cat([low_rank[:, :rank], b[:, :states], c[:, :states]], dim=1),
        "dt_proj": grads.timescale[..., :rank],
        "dt_bias": grads.timescale_bias,
        "A_log": grads.a[:, :states].mT * weights.A,
        "D": grads.d,
    }
    row: list[Tensor] = []
    for name, field in weights._asdict().items():
        row += [fields[name]] if isinstance(field, Tensor) else fields[name].unbind()
    return [grad.contiguous() for grad in row]


def _composed_gradients(
    ctx: Any,
    xz: Tensor,
    projected: Tensor,
    packed: PackedWeights,
    grad: Tensor | None,
    projected_grad: Tensor | None,
    parameters: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients in differentiable operations."""

    def run(xz: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ctx.composed(xz, _grouped(parameters, ctx.lengths))

    y_grad = torch.zeros_like(xz[..., : xz.shape[-1] // 2]) if grad is None else grad
    _, b, c = packed.split(torch.zeros_like(projected) if projected_grad is None else projected_grad)
    states = _grouped(parameters, ctx.lengths).states
    return vjp(run, (xz, *parameters), (y_grad, *(t[..., :states].to(xz.dtype) for t in (b, c))))
