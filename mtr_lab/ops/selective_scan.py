"""The selective scan of a Mamba block, all directions at once.

Shapes: G directions, B images, L tokens, E = d_inner channels, N = d_state. Everything is channels-last and in token
order; a direction that reads the sequence backwards is marked in ``reverse``, nothing is ever flipped by the caller.
"""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.errors import unknown
from mtr_lab.ops import backend, cpu

STATS = ("delta", "write", "output")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    reverse: Sequence[bool] = (False,),
    gap: Tensor | None = None,
    stretch: Tensor | None = None,
    stats: Sequence[str] = (),
) -> tuple[Tensor, Tensor]:
    r"""Run the selective state-space recurrence and say cheaply what it did with each token.

    For each direction, in its reading order, with ``Δ = softplus(delta + delta_bias)``::

        h_t = exp(Δ_t A) h_{t-1} + (Δ_t u_t) B_t        y_t = C_t h_t + D u_t

    and the result is ``silu(z) · Σ_directions y``. The state is float32 (float64 for float64 inputs).

    Args:
        u: input after convolution and activation, (G, B, L, E).
        delta: timescale before bias and softplus, (G, B, L, E).
        A: state matrix, negative, (G, E, N).
        B, C: input and output projections of each token, (G, B, L, N).
        D: skip connection, (G, E).
        z: gate before its SiLU, (B, L, E); ``None`` for no gate.
        delta_bias: (G, E).
        reverse: for each direction, whether it reads from the last token to the first.
        gap: (B, L), how many tokens were removed between each token and the one before it. The state decays over a
            gap of g as over g tokens with zero input, ``exp(g softplus(delta_bias) A)``, in whichever direction it
            is crossed. ``None`` for no gaps. Not differentiable.
        stretch: (B, L), positive; Δ of a token that stands for several is multiplied by it, so that it writes, and
            lets the past fade, for longer. ``None`` for 1. Not differentiable.
        stats: which per-token sums over the channels to emit, from ``STATS``: ``delta`` is Σ Δ, ``write`` is
            Σ (Δ u)², ``output`` is Σ max(0, y) before the gate.

    Returns:
        y: (B, L, E) in the dtype of ``u``.
        sums: (G, B, L, len(stats)) float32 (float64 for float64), in the order asked, at each token's own position.
            Not differentiable.

    Raises:
        UserError: an unknown statistic, or a selected backend that cannot run these inputs.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752; the gap
    is the hidden-state alignment of Zhan et al., "Exploring Token Pruning in Vision State Space Models",
    arXiv 2409.18962.
    """
    for name in stats:
        if name not in STATS:
            raise unknown("scan statistic", name, STATS)
    name = backend.pick(u, package="mamba_ssm", gap=gap is not None)
    y, sums = _scan(u, delta, A, B, C, D, z, delta_bias, gap, stretch, list(reverse), bool(stats), name)
    return y, torch.stack([sums[..., STATS.index(s)] for s in stats], dim=-1) if stats else sums


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
    gap: Tensor | None,
    stretch: Tensor | None,
    reverse: Sequence[bool],
    with_stats: bool,
) -> tuple[Tensor, Tensor]:
    """The recurrence written as a loop over tokens in plain, differentiable PyTorch: what the others must equal."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    out_dtype = u.dtype
    u, delta, A, B, C, D = (t.to(dtype) for t in (u, delta, A, B, C, D))
    bias = torch.zeros_like(D) if delta_bias is None else delta_bias.to(dtype)
    delta = F.softplus(delta + bias[:, None, None, :])
    if stretch is not None:
        delta = delta * stretch[..., None]
    write = delta * u

    def in_reading_order(x: Tensor) -> Tensor:  # (G, B, L, *) with the backward directions flipped along L
        return torch.stack([x[g].flip(1) if r else x[g] for g, r in enumerate(reverse)])

    delta_s, write_s, B_s, C_s = (in_reading_order(t) for t in (delta, write, B, C))
    if gap is not None:
        # A backward scan crosses the gap in front of token t + 1 when it arrives at token t.
        after = F.pad(gap[:, 1:], (0, 1))
        gap_s = in_reading_order(torch.stack([after if r else gap for r in reverse]).to(dtype))  # (G, B, L)
        idle = (F.softplus(bias)[..., None] * A)[:, None]  # (G, 1, E, N)

    state = torch.zeros(*u.shape[:2], *A.shape[1:], dtype=dtype, device=u.device)  # (G, B, E, N)
    steps = []
    for t in range(u.shape[2]):
        exponent = delta_s[:, :, t, :, None] * A[:, None]
        if gap is not None:
            exponent = exponent + gap_s[:, :, t, None, None] * idle
        state = torch.exp(exponent) * state + write_s[:, :, t, :, None] * B_s[:, :, t, None, :]
        steps.append((state * C_s[:, :, t, None, :]).sum(-1))
    y = in_reading_order(torch.stack(steps, dim=2)) + D[:, None, None, :] * u  # (G, B, L, E)

    total = y.sum(0)
    if z is not None:
        total = total * F.silu(z.to(dtype))
    return total.to(out_dtype), scan_stats(delta, write, y) if with_stats else y.new_empty(*y.shape[:3], 0)


def scan_stats(delta: Tensor, write: Tensor, y: Tensor) -> Tensor:
    """``STATS`` from Δ, Δu and the ungated output of each direction, all (G, B, L, E) -> (G, B, L, 3)."""
    return torch.stack([delta.sum(-1), write.square().sum(-1), y.clamp(min=0).sum(-1)], dim=-1)


def selective_scan_mamba_ssm(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
    gap: Tensor | None,
    stretch: Tensor | None,
    reverse: Sequence[bool],
    with_stats: bool,
) -> tuple[Tensor, Tensor]:
    """The authors' CUDA kernel, one launch a direction, on channels-first copies. ``gap`` must be None."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def channels_first(x: Tensor, flip: bool) -> Tensor:  # (B, L, *) -> (B, *, L)
        return (x.flip(1) if flip else x).transpose(1, 2).contiguous()

    if stretch is not None:
        if delta_bias is not None:
            delta = delta.float() + delta_bias.float()[:, None, None, :]
        delta, delta_bias = F.softplus(delta.float()) * stretch[..., None], None
    ys = []
    for g, flip in enumerate(reverse):
        y = selective_scan_fn(
            channels_first(u[g], flip),
            channels_first(delta[g].to(u.dtype), flip),
            A[g].float(),
            channels_first(B[g].to(u.dtype), flip),
            channels_first(C[g].to(u.dtype), flip),
            D[g].float(),
            # The statistics are of the ungated output, which the fused gate would hide.
            z=None if z is None or with_stats else channels_first(z.to(u.dtype), flip),
            delta_bias=None if delta_bias is None else delta_bias[g].float(),
            delta_softplus=stretch is None,
        ).transpose(1, 2)
        ys.append(y.flip(1) if flip else y)
    if not with_stats:
        return torch.stack(ys).sum(0), u.new_empty(*u.shape[:3], 0, dtype=torch.float32)
    per_direction = torch.stack(ys).float()
    total = per_direction.sum(0)
    if z is not None:
        total = total * F.silu(z.float())
    step = delta.float() if delta_bias is None else delta.float() + delta_bias.float()[:, None, None, :]
    step = F.softplus(step) if stretch is None else step
    return total.to(u.dtype), scan_stats(step, step * u.float(), per_direction)


def selective_scan_triton(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Kernels in ``mtr_lab.ops.gpu``, on channels-last data as it is."""
    from mtr_lab.ops.gpu import scan

    return scan.selective_scan(*inputs)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": selective_scan_reference,
    "cpu": cpu.selective_scan,
    "triton": selective_scan_triton,
    "mamba_ssm": selective_scan_mamba_ssm,
}


@torch.library.custom_op("mtr_lab::selective_scan", mutates_args=())
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Optional[Tensor],
    delta_bias: Optional[Tensor],
    gap: Optional[Tensor],
    stretch: Optional[Tensor],
    reverse: Sequence[bool],
    with_stats: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    return IMPLEMENTATIONS[implementation](u, delta, A, B, C, D, z, delta_bias, gap, stretch, reverse, with_stats)


@_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, gap, stretch, reverse, with_stats, implementation):  # type: ignore[no-untyped-def]
    sums_dtype = torch.promote_types(u.dtype, torch.float32)
    return u.new_empty(u.shape[1:]), u.new_empty(*u.shape[:3], len(STATS) * with_stats, dtype=sums_dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.reverse, _, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, gap, stretch = ctx.saved_tensors
    inputs = [None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    name = backend.pick_differentiable(tensors[0], package="mamba_ssm", gap=gap is not None)
    if name == "triton":
        from mtr_lab.ops.gpu import scan_backward

        return *scan_backward.selective_scan_backward(*(*ctx.saved_tensors, ctx.reverse, grad_y)), *(None,) * 5
    with torch.enable_grad():
        y, _ = IMPLEMENTATIONS[name](*inputs, gap, stretch, ctx.reverse, False)
    grads = iter(torch.autograd.grad(y, [t for t in inputs if t is not None], grad_y))
    return *(None if t is None else next(grads) for t in inputs), None, None, None, None, None


_scan.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.mtr_lab.selective_scan)
def selective_scan_flops(u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """9·L·E·N + 2·L·E a direction and image: the literature's count of the recurrence and of D-skip and gate."""
    directions, batch, length, channels = u_shape
    return directions * batch * length * channels * (9 * A_shape[-1] + 2)
