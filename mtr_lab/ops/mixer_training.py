"""The Mamba mixer without in_proj and out_proj in a training step on a GPU: few kernels in both passes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtr_lab.ops.packed import MambaWeights, PackedWeights
from mtr_lab.ops.statistics import as_asked, emitted
from mtr_lab.ops.vjp import vjp

_WEIGHTS = ", ".join(f"Tensor {name}" for name in PackedWeights._fields)
_SIZES = "int[] reverse, int rank, int states"  # unpadded, for the count of FLOPs

Composed = Callable[[Tensor, MambaWeights], tuple[Tensor, Tensor, Tensor]]
"""Takes xz and weights; returns y, B and C, in differentiable operations."""


def mamba_inner_training(
    xz: Tensor,
    weights: MambaWeights,
    composed: Composed,
    *,
    reverse: Sequence[bool],
    stats: Sequence[str],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``mamba_inner`` with gradients, without order, gap and delta_scale. Arguments and result as of ``mamba_inner``.

    Args:
        composed: the same for second derivatives, which are computed through it.
    """
    from mtr_lab.ops.gpu import mixer_weights

    names, directions = emitted(stats), [int(r) for r in reverse]
    parameters = [p for field in weights for p in ([field] if isinstance(field, Tensor) else field)]
    with torch.no_grad():
        packed = mixer_weights.pack(xz, weights)
    lengths = [None if isinstance(field, Tensor) else len(field) for field in weights]
    y, sums, projected = _Mixer.apply(xz, packed, composed, directions, names, scale, lengths, *parameters)
    _, b, c = packed.split(projected)
    return y, as_asked(sums, stats), b[..., : weights.states], c[..., : weights.states]


def fills_gpu(xz: Tensor) -> bool:
    """Whether xz (B, L, 2E) gives every multiprocessor at least two programs of the scan; True on other devices.

    A program scans 64 channels of an image over the whole sequence. With fewer programs, the separate operations, which
    split sequences, are faster.
    """
    if not xz.is_cuda:
        return True
    programs = xz.shape[0] * -(-xz.shape[2] // 128)
    return programs >= 2 * torch.cuda.get_device_properties(xz.device).multi_processor_count


class _Mixer(torch.autograd.Function):
    """The packed weights have no gradient; ``parameters``, the fields of ``MambaWeights`` in a row, have it.

    ``lengths`` tells for each field whether it is one tensor (``None``) or how many parameters it has.
    """

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
        weights = _unflattened(parameters, lengths)
        sizes = reverse, weights.rank, weights.states
        y, sums, projected, *saved = _forward(xz, *packed, *sizes, " ".join(stats), scale)
        ctx.composed, ctx.sizes, ctx.scale, ctx.lengths = composed, sizes, scale, lengths
        ctx.save_for_backward(xz, projected, *packed, *saved, *parameters)
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        return y, sums, projected

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None, projected_grad: Tensor | None) -> tuple[Any, ...]:
        xz, projected, *tensors = ctx.saved_tensors
        packed, saved, parameters = PackedWeights(*tensors[:7]), tensors[7:11], tensors[11:]
        if torch.is_grad_enabled():
            xz_grad, *grads = _composed_gradients(ctx, xz, projected, packed, grad, projected_grad, parameters)
            return xz_grad, *(None,) * 6, *grads
        if grad is None:
            grad = torch.zeros_like(xz[..., : xz.shape[-1] // 2])
        xz_grad, *fields = _backward(xz, *packed, projected, *saved, grad, projected_grad, *ctx.sizes, ctx.scale)
        flat = [g for field, n in zip(fields, ctx.lengths, strict=True) for g in ([field] if n is None else field)]
        return xz_grad, *(None,) * 6, *(g.to(p.dtype) for g, p in zip(flat, parameters, strict=True))


# Operators, so that FlopCounterMode counts a training step as that of the separate operations.
@torch.library.custom_op(
    "mtr_lab::mamba_inner_training",
    mutates_args=(),
    schema=f"(Tensor xz, {_WEIGHTS}, {_SIZES}, str stats, float scale) -> ({', '.join(['Tensor'] * 7)})",
)
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """y, statistics and projected, then what is saved."""
    from mtr_lab.ops.gpu import mixer_training

    xz, *weights = arguments[:8]
    reverse, _, _, stats, scale = arguments[8:]
    y, sums, projected, saved = mixer_training.forward(xz, PackedWeights(*weights), reverse, stats.split(), scale)
    return y, sums, projected, *saved


@_forward.register_fake
def _like_forward(*arguments: Any) -> tuple[Tensor, ...]:
    from mtr_lab.ops.gpu.scan_walk import SAVE_EVERY

    xz, _, _, projection, _, _, a, _, reverse, _, _, stats, _ = arguments
    images, length, channels = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    rows = len(reverse), images, length
    sums, projected = (xz.new_empty(*rows, n, dtype=torch.float32) for n in (len(stats.split()), projection.shape[2]))
    u, delta = (xz.new_empty(*rows, channels) for _ in range(2))
    y, ungated = (xz.new_empty(images, length, channels) for _ in range(2))
    num_saved = (length - 1) // SAVE_EVERY.value
    return y, sums, projected, u, delta, ungated, xz.new_empty(*rows[:2], num_saved, a.shape[1] // 4, channels, 4)


@torch.library.custom_op(
    "mtr_lab::mamba_inner_training_backward",
    mutates_args=(),
    schema=f"(Tensor xz, {_WEIGHTS}, Tensor projected, Tensor u, Tensor delta, Tensor ungated, Tensor saved_states, "
    f"Tensor grad, Tensor? projected_grad, {_SIZES}, float scale) -> ({', '.join(['Tensor'] * 8)})",
)
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The gradients of xz and of the parameters, one tensor (G, *) for each field."""
    from mtr_lab.ops.gpu import mixer_training

    xz, *weights = arguments[:8]
    projected, *saved = arguments[8:13]
    grad, projected_grad, reverse, rank, states, scale = arguments[13:]
    xz_grad, grads = mixer_training.backward(
        xz, PackedWeights(*weights), projected, mixer_training.Saved(*saved), reverse, rank, states, scale, grad,
        projected_grad,
    )  # fmt: skip
    return xz_grad, *grads


@_backward.register_fake
def _like_backward(*arguments: Any) -> tuple[Tensor, ...]:
    xz, conv_weight = arguments[:2]
    *_, rank, states, _ = arguments
    directions, width, channels = conv_weight.shape
    shapes = (channels, 1, width), (channels,), (rank + 2 * states, channels), (channels, rank), (channels,)
    fields = (conv_weight.new_empty(directions, *s) for s in (*shapes, (channels, states), (channels,)))
    return xz.new_empty(xz.shape), *fields


def _unflattened(parameters: Sequence[Tensor], lengths: Sequence[int | None]) -> MambaWeights:
    """The fields that the parameters come from."""
    remaining = iter(parameters)
    return MambaWeights(*(next(remaining) if n is None else [next(remaining) for _ in range(n)] for n in lengths))


def _composed_gradients(
    ctx: Any,
    xz: Tensor,
    projected: Tensor,
    packed: PackedWeights,
    grad: Tensor | None,
    projected_grad: Tensor | None,
    parameters: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients of xz and the parameters, which are differentiable."""

    def run(xz: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ctx.composed(xz, _unflattened(parameters, ctx.lengths))

    y_grad = torch.zeros_like(xz[..., : xz.shape[-1] // 2]) if grad is None else grad
    _, b, c = packed.split(torch.zeros_like(projected) if projected_grad is None else projected_grad)
    states = _unflattened(parameters, ctx.lengths).states
    return vjp(run, (xz, *parameters), (y_grad, *(t[..., :states].to(xz.dtype) for t in (b, c))))
