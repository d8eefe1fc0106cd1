"""The selective scan of a Mamba block in all its directions, with its gradients.

Shapes: G directions, B images, L tokens, E = d_inner channels, N = d_state. All tensors are channels-last and in token
order, but for ``gap``, which is in reading order. ``reverse`` or ``order`` gives the reading order of each direction;
callers flip and gather nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.errors import UserError
from mtr_lab.ops import scan_gradient
from mtr_lab.ops.registry import Implementation, Operation
from mtr_lab.ops.scan_inputs import SCHEMA, ScanInputs, flat
from mtr_lab.ops.scan_mamba_ssm import is_unfit, selective_scan_mamba_ssm
from mtr_lab.ops.scan_portable import selective_scan_portable
from mtr_lab.ops.scan_reference import selective_scan_reference
from mtr_lab.ops.shapes import check_reading, check_shapes
from mtr_lab.ops.statistics import as_asked, check_statistics, emitted

REPEAT_FLOPS = 4
"""Additional FLOPs of each token, channel and state with ``repeats``: Δ A, its exponential, a quotient, a product."""


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
    reverse: Sequence[bool] | None = None,
    order: Tensor | None = None,
    gap: Tensor | None = None,
    delta_scale: Tensor | None = None,
    repeats: Tensor | None = None,
    stats: Sequence[str] = (),
) -> tuple[Tensor, Tensor]:
    r"""Run the selective state-space recurrence, and compute statistics of each token.

    For each direction, in its reading order, with ``Δ = softplus(delta + delta_bias)``:

        h_t = exp(Δ_t A) h_{t-1} + (Δ_t u_t) B_t        y_t = C_t h_t + D u_t

    and the result is ``silu(z) · Σ_directions y``. ``delta_scale`` multiplies Δ_t, in statistics too. A gap of n
    tokens adds n · softplus(delta_bias), not scaled, to Δ_t in the exponential alone. A token that stands for n equal
    ones (``repeats``) is read in one step, exactly:

        h_t = exp(n Δ_t A) h_{t-1} + (1 + exp(Δ_t A) + … + exp((n-1) Δ_t A)) (Δ_t u_t) B_t

    and its statistics see n Δ_t. The state is float32 (float64 for float64 inputs).

    Args:
        u: input after convolution and activation, (G, B, L, E).
        delta: timescale before bias and softplus, (G, B, L, E).
        A: state matrix, negative, (G, E, N).
        B, C: input and output projections of each token, (G, B, L, N).
        D: skip connection, (G, E).
        z: gate before its SiLU, (B, L, E); ``None`` for no gate.
        delta_bias: (G, E).
        reverse: for each direction, whether it reads from the last token to the first; ``None`` for token order.
        order: (G, B, L) int64, a permutation of the tokens for each direction and image: step s of direction g reads
            token ``order[g, b, s]``. ``None`` for the order of ``reverse``. With an order, leave ``reverse`` out. Its
            values are not checked: wrong ones would be read out of bounds.
        gap: (B, G, L), batch first, in reading order: ``gap[b, g, s]`` tokens are missing just before step s of
            direction g, 0 for s = 0. The state decays over n missing tokens as over n tokens with zero input, by
            ``exp(n softplus(delta_bias) A)``. ``None`` for no gaps. Not differentiable.
        delta_scale: (B, L), positive factor on Δ of each token: a token that stands for several takes a longer step.
            ``None`` for 1. Not differentiable.
        repeats: (B, L), the number n ≥ 1 of equal tokens, read one after the other, that each token stands for.
            ``None`` for 1. Not differentiable, and not together with ``delta_scale``. With it the gradients of other
            inputs are computed in plain PyTorch.
        stats: the per-token sums over channels to compute, from ``STATS``: ``delta`` is Σ Δ, ``write`` is Σ (Δ u)²,
            ``output`` is Σ max(0, y) before the gate.

    Returns:
        y: (B, L, E) in the dtype of ``u``.
        sums: (G, B, L, len(stats)) float32 (float64 for float64), in the order of ``stats`` and in token order. Not
            differentiable.

    Raises:
        UserError: an unknown statistic, shapes that do not match, an ``order`` of another dtype or with ``reverse``,
            ``repeats`` with ``delta_scale``, or a selected backend that cannot run these inputs.
        ValueError: ``gap``, ``delta_scale`` or ``repeats`` requires a gradient.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752; the gap
    is the hidden-state alignment of Zhan et al., "Exploring Token Pruning in Vision State Space Models",
    arXiv 2409.18962.
    """
    check_statistics(stats)
    # Integers: the tracer of torch.jit takes no list of booleans.
    backward = (0,) * len(u) if reverse is None else tuple(int(r) for r in reverse)
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, order, gap, delta_scale, repeats, backward)
    _check(inputs)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (gap, delta_scale, repeats)):
        raise ValueError("selective_scan has no gradient of gap, delta_scale and repeats: detach them.")
    y, sums = SELECTIVE_SCAN(*inputs, " ".join(emitted(stats)))  # the tracer takes no list of strings either
    return y, as_asked(sums, stats)


def _check(inputs: ScanInputs) -> None:
    """Raise a ``UserError`` unless all shapes match those of ``u`` and ``A``: kernels do not check bounds."""
    u, A = inputs.u, inputs.A
    if u.ndim != 4 or A.ndim != 3 or 0 in u.shape[2:]:
        raise UserError(
            f"selective_scan: expected u (G, B, L, E) of at least one token and A (G, E, N), got {tuple(u.shape)} and "
            f"{tuple(A.shape)}."
        )
    directions, images, length, channels = u.shape
    parameter, projection = (directions, channels), (directions, images, length, A.shape[2])
    expected = {
        "delta": u.shape,
        "A": (*parameter, A.shape[2]),
        "B": projection,
        "C": projection,
        "D": parameter,
        "z": (images, length, channels),
        "delta_bias": parameter,
        "order": (directions, images, length),
        "gap": (images, directions, length),
        "delta_scale": (images, length),
        "repeats": (images, length),
    }
    shapes = {name: (getattr(inputs, name), shape) for name, shape in expected.items()}
    check_shapes("selective_scan", f"u of shape {tuple(u.shape)}", shapes)
    check_reading("selective_scan", directions, inputs.reverse, inputs.order, inputs.delta_scale, inputs.repeats)


def selective_scan_triton(inputs: ScanInputs, stats: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Kernels in ``mtr_lab.ops.gpu``."""
    from mtr_lab.ops.gpu import scan

    return scan.selective_scan(inputs, stats)


def _selective_scan_cpu(inputs: ScanInputs, stats: Sequence[str]) -> tuple[Tensor, Tensor]:
    from mtr_lab.ops.cpu import scan

    return scan.selective_scan(inputs, stats)


def _emitting(scan: Callable[[ScanInputs, Sequence[str]], tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """Like ``flat``, with the names of statistics joined in one string."""
    return flat(lambda inputs, names: scan(inputs, names.split()))


def _like_result(*arguments: Any) -> tuple[Tensor, Tensor]:
    u, names = arguments[0], arguments[-1]
    sums_dtype = torch.promote_types(u.dtype, torch.float32)
    return u.new_empty(u.shape[1:]), u.new_empty(*u.shape[:3], len(names.split()), dtype=sums_dtype)


SELECTIVE_SCAN = Operation(
    "selective_scan",
    [
        Implementation("triton", _emitting(selective_scan_triton), package="triton"),
        Implementation("cpu", _emitting(_selective_scan_cpu)),
        Implementation("mamba_ssm", _emitting(selective_scan_mamba_ssm), unfit=flat(is_unfit), package="mamba_ssm"),
        Implementation("reference", _emitting(selective_scan_reference)),
        Implementation("portable", _emitting(selective_scan_portable)),
    ],
    schema=(f"{SCHEMA}, str stats", "(Tensor, Tensor)"),
    fake=_like_result,
)

SELECTIVE_SCAN.operator.register_autograd(scan_gradient.backward, setup_context=scan_gradient.setup)


@register_flop_formula(torch.ops.mtr_lab.selective_scan)
def selective_scan_flops(  # type: ignore[no-untyped-def]
    u_shape, delta_shape, A_shape, B, C, D, z, delta_bias, order, gap, delta_scale, repeats, *args, **kwargs
) -> int:
    """9·L·E·N + 2·L·E for each direction and image: the literature's count, of the recurrence and of skip and gate.

    With ``repeats``, ``REPEAT_FLOPS``·L·E·N more.
    """
    directions, batch, length, channels = u_shape
    each_state = 9 if repeats is None else 9 + REPEAT_FLOPS
    return directions * batch * length * channels * (each_state * A_shape[-1] + 2)
