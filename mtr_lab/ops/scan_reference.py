"""The selective scan in plain PyTorch: the reference, a loop over tokens, and the gradients.

Shapes as in ``selective_scan``. All functions are differentiable.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtr_lab.ops.scan_inputs import ScanInputs
from mtr_lab.ops.statistics import channel_sums


def selective_scan_reference(
    inputs: ScanInputs, stats: Sequence[str], *, run: Callable[..., Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence in plain PyTorch, by a loop over tokens: every other implementation is tested against it.

    ``run``: computes the recurrence instead of the loop.
    """
    *_, z, delta_bias, order, gap, delta_scale, repeats, reverse = inputs
    dtype = torch.promote_types(inputs.u.dtype, torch.float32)
    u, delta, A, B, C, D = (t.to(dtype) for t in inputs[:6])
    bias = torch.zeros_like(D) if delta_bias is None else delta_bias.to(dtype)
    delta = F.softplus(delta + bias[:, None, None, :])
    if delta_scale is not None:
        delta = delta * delta_scale[..., None].to(dtype)
    write, span = delta * u, delta
    read = [in_reading_order(t, order, reverse) for t in (write, B, C)]
    runs = None
    if repeats is not None:
        times = repeats[..., None].to(dtype)
        span = delta * times
        runs = Runs(*(in_reading_order(t, order, reverse) for t in (delta, times.expand(delta.shape))))
    compute: Callable[..., Tensor] = run or _token_by_token
    y = compute(in_reading_order(span, order, reverse), *read, A, _gap_decay(gap, bias, A), runs)
    y = in_token_order(y, order, reverse) + D[:, None, None, :] * u  # (G, B, L, E)

    total = y.sum(0)
    if z is not None:
        total = total * F.silu(z.to(dtype))
    return total.to(inputs.u.dtype), channel_sums(stats, span, u, y)


def in_reading_order(x: Tensor, order: Tensor | None, reverse: Sequence[int]) -> Tensor:
    """(G, B, L, K) in token order -> in the reading order of each direction."""
    if order is None:
        return torch.stack([x[g].flip(1) if r else x[g] for g, r in enumerate(reverse)])
    return x.gather(2, order[..., None].expand_as(x))


def in_token_order(x: Tensor, order: Tensor | None, reverse: Sequence[int]) -> Tensor:
    """The inverse of ``in_reading_order``."""
    return in_reading_order(x, None if order is None else order.argsort(-1), reverse)


class GapDecay(NamedTuple):
    """The decay of the state over missing tokens."""

    gap: Tensor
    """(G, B, L): the number of missing tokens before each step."""
    exponent: Tensor
    """(G, E, N): log of the decay over one missing token."""


def _gap_decay(gap: Tensor | None, bias: Tensor, A: Tensor) -> GapDecay | None:
    return None if gap is None else GapDecay(gap.transpose(0, 1).to(A.dtype), F.softplus(bias)[..., None] * A)


class Runs(NamedTuple):
    """Runs of equal tokens, each read in one step."""

    delta: Tensor
    """(G, B, L, E): Δ of one token of the run."""
    times: Tensor
    """(G, B, L, E): the number of its tokens."""


def growth(product: Tensor, times: Tensor) -> Tensor:
    """Σ_{k < times} exp(k Δ A), by which a run of ``times`` tokens multiplies the input of one.

    Args:
        product: Δ A.
        times: of a shape that broadcasts with it.
    """
    product = _not_zero(product)
    return torch.expm1(times * product) / torch.expm1(product)


def _growth(delta: Tensor, times: Tensor, A: Tensor) -> Tensor:
    """``growth`` for Δ and times (*, E) and A (*, E, N), (*, E, N)."""
    return growth(delta[..., None] * A, times[..., None])


def _growth_slope(delta: Tensor, times: Tensor, A: Tensor, growth: Tensor) -> Tensor:
    """The derivative of ``_growth`` by Δ A, given its value."""
    product, times = _not_zero(delta[..., None] * A), times[..., None]
    return (times * torch.exp(times * product) - growth * torch.exp(product)) / torch.expm1(product)


def _not_zero(product: Tensor) -> Tensor:
    """Δ A, below 0 by so little that every sum of exponentials rounds to the number of its terms."""
    return product.clamp(max=-(torch.finfo(product.dtype).eps ** 2))


def _decay(delta: Tensor, A: Tensor, gaps: GapDecay | None) -> Tensor:
    """The factor on the state at each step, (G, B, L, E, N)."""
    exponent = delta[..., None] * A[:, None, None]
    if gaps is not None:
        exponent = exponent + gaps.gap[..., None, None] * gaps.exponent[:, None, None]
    return torch.exp(exponent)


def _token_by_token(
    delta: Tensor, write: Tensor, B: Tensor, C: Tensor, A: Tensor, gaps: GapDecay | None, runs: Runs | None
) -> Tensor:
    state = torch.zeros(*delta.shape[:2], *A.shape[1:], dtype=A.dtype, device=A.device)  # (G, B, E, N)
    steps = []
    for t in range(delta.shape[2]):
        exponent = delta[:, :, t, :, None] * A[:, None]
        if gaps is not None:
            exponent = exponent + gaps.gap[:, :, t, None, None] * gaps.exponent[:, None]
        update = write[:, :, t, :, None] * B[:, :, t, None, :]
        if runs is not None:
            update = update * _growth(runs.delta[:, :, t], runs.times[:, :, t], A[:, None])
        state = torch.exp(exponent) * state + update
        steps.append((state * C[:, :, t, None, :]).sum(-1))
    return torch.stack(steps, dim=2)


def _recurrence(decay: Tensor, x: Tensor, *, adjoint: bool = False) -> Tensor:
    """h_t = decay_t h_{t-1} + x_t along L, (G, B, L, E, N), by a loop over tokens.

    Its ``adjoint`` runs from the last token to the first: h_t = decay_{t+1} h_{t+1} + x_t.
    """
    last = x.shape[2] - 1
    states = [x[:, :, last if adjoint else 0]]
    for t in range(last):
        at = last - 1 - t if adjoint else t + 1
        states.append(torch.addcmul(x[:, :, at], decay[:, :, at + adjoint], states[-1]))
    return torch.stack(states[::-1] if adjoint else states, dim=2)


def _recurrence_by_doubling(decay: Tensor, x: Tensor, *, adjoint: bool = False) -> Tensor:
    """``_recurrence`` in log2(L) steps; each doubles the tokens that a state covers (Hillis and Steele, 1986)."""
    if adjoint:
        return _recurrence_by_doubling(decay.flip(2).roll(1, 2), x.flip(2)).flip(2)
    length, covered = x.shape[2], 1
    while covered < length:
        before = (0, 0, 0, 0, covered, 0)
        x = x + decay * F.pad(x[:, :, :-covered], before)
        decay = decay * F.pad(decay[:, :, :-covered], before)
        covered *= 2
    return x


def selective_scan_backward_reference(
    inputs: ScanInputs, grad: Tensor, *, loop: bool = True
) -> tuple[Tensor | None, ...]:
    """The gradients of the first eight inputs for ``grad`` (B, L, E), the gradient of y, in plain PyTorch.

    Each has the shape and the dtype of its input; that of an absent input is ``None``.

    The adjoint λ of the state obeys the recurrence in reverse: λ_t = g_t C_t + decay_{t+1} λ_{t+1}, where g_t is the
    gradient of the output before the gate.
    """
    recurrence = _recurrence if loop else _recurrence_by_doubling
    *_, z, delta_bias, order, gap, delta_scale, repeats, reverse = inputs
    dtype = torch.promote_types(inputs.u.dtype, torch.float32)
    u, delta, A, B, C, D, grad = (t.to(dtype) for t in (*inputs[:6], grad))
    bias = torch.zeros_like(D) if delta_bias is None else delta_bias.to(dtype)
    before = delta + bias[:, None, None, :]
    scale: Any = 1 if delta_scale is None else delta_scale[..., None].to(dtype)

    step, u_s, B_s, C_s = (in_reading_order(t, order, reverse) for t in (F.softplus(before) * scale, u, B, C))
    gaps, write = _gap_decay(gap, bias, A), step * u_s
    times: Any = (
        1 if repeats is None else in_reading_order(repeats[..., None].to(dtype).expand(u.shape), order, reverse)
    )
    growth: Any = 1 if repeats is None else _growth(step, times, A[:, None, None])  # (G, B, L, E, N)
    decay = _decay(step * times, A, gaps)
    states = recurrence(decay, growth * write[..., None] * B_s[..., None, :])  # (G, B, L, E, N)

    grad_z = None
    if z is not None:
        gate, raw = torch.sigmoid(z.to(dtype)), z.to(dtype)
        y = in_token_order((states * C_s[..., None, :]).sum(-1), order, reverse) + D[:, None, None, :] * u
        grad_z = grad * y.sum(0) * gate * (1 + raw * (1 - gate))
        grad = grad * gate * raw

    g = in_reading_order(grad.expand_as(u), order, reverse)
    adjoint = recurrence(decay, g[..., None] * C_s[..., None, :], adjoint=True)
    grad_exponent = adjoint * decay * F.pad(states[:, :, :-1], (0, 0, 0, 0, 1, 0))

    grad_write = (adjoint * growth * B_s[..., None, :]).sum(-1)
    grad_product = grad_exponent  # of Δ A
    if repeats is not None:
        slope = _growth_slope(step, times, A[:, None, None], growth)
        grad_product = times[..., None] * grad_exponent + adjoint * write[..., None] * B_s[..., None, :] * slope
    grad_step = grad_write * u_s + (grad_product * A[:, None, None]).sum(-1)
    grad_delta = in_token_order(grad_step, order, reverse) * scale * torch.sigmoid(before)
    grad_A = (grad_product * step[..., None]).sum((1, 2))
    grad_bias = grad_delta.sum((1, 2))
    if gaps is not None:
        grad_idle = (grad_exponent * gaps.gap[..., None, None]).sum((1, 2))
        grad_A = grad_A + grad_idle * F.softplus(bias)[..., None]
        grad_bias = grad_bias + (grad_idle * A).sum(-1) * torch.sigmoid(bias)
    grads = (
        in_token_order(grad_write * step, order, reverse) + grad * D[:, None, None, :],
        grad_delta,
        grad_A,
        in_token_order((adjoint * growth * write[..., None]).sum(-2), order, reverse),
        in_token_order((states * g[..., None]).sum(-2), order, reverse),
        (grad * u).sum((1, 2)),
        grad_z,
        None if delta_bias is None else grad_bias,
    )
    return tuple(
        None if t is None or gradient is None else gradient.to(t.dtype)
        for t, gradient in zip(inputs[:8], grads, strict=True)
    )
