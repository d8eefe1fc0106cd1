"""The selective scan of a block whose directions share their input and project a low-rank Δ, and the norm after it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.errors import UserError
from mtr_lab.ops.registry import Implementation, Operation, autocasts, lacks_gradient
from mtr_lab.ops.scan import selective_scan, selective_scan_flops
from mtr_lab.ops.shapes import check_reading, check_shapes
from mtr_lab.ops.statistics import as_asked, check_statistics, emitted

MAX_STATES = 2
"""States up to which the tiled kernel is used: with more, the exponentials, not the steps, take the time."""


def scan_low_rank(
    u: Tensor,
    low_rank: Tensor,
    timescale: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    delta_bias: Tensor,
    reverse: Sequence[bool],
    order: Tensor | None = None,
    gap: Tensor | None = None,
    delta_scale: Tensor | None = None,
    repeats: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    stats: Sequence[str] = (),
) -> tuple[Tensor, Tensor]:
    """``mtr_lab.ops.selective_scan`` without a gate, its Δ the product of ``low_rank`` and ``timescale``.

    Args:
        u: input of all directions, (B, L, E).
        low_rank: low-rank Δ, B and C of each token side by side, (G, B, L, R + 2N).
        timescale: (G, E, R), projects Δ.
        A: state matrix, negative, (G, E, N).
        D: skip connection, (G, E).
        delta_bias: (G, E).
        reverse, order, gap, delta_scale, repeats, stats: as of ``selective_scan``.
        norm_weight, norm_bias, eps: of a LayerNorm over E of the result, (E,) each; ``None`` for no norm.

    Returns:
        y: (B, L, E) in the dtype of ``u``; with a norm in float32 under autocast on a GPU, as of ``F.layer_norm``.
        sums: (G, B, L, len(stats)), as of ``selective_scan``.

    Raises:
        UserError: as ``selective_scan``, or ``norm_bias`` without ``norm_weight``.
    """
    check_statistics(stats)
    if u.ndim != 3 or timescale.ndim != 3 or A.ndim != 3 or 0 in u.shape[1:]:
        raise UserError(
            "scan_low_rank: expected u (B, L, E) of at least one token, timescale (G, E, R) and A (G, E, N), got "
            f"{tuple(u.shape)}, {tuple(timescale.shape)} and {tuple(A.shape)}."
        )
    directions, rank, states = len(timescale), timescale.shape[2], A.shape[2]
    images, length, channels = u.shape
    expected = {
        "low_rank": (low_rank, (directions, images, length, rank + 2 * states)),
        "timescale": (timescale, (directions, channels, rank)),
        "A": (A, (directions, channels, states)),
        "D": (D, (directions, channels)),
        "delta_bias": (delta_bias, (directions, channels)),
        "order": (order, (directions, images, length)),
        "gap": (gap, (images, directions, length)),
        "delta_scale": (delta_scale, (images, length)),
        "repeats": (repeats, (images, length)),
        "norm_weight": (norm_weight, (channels,)),
        "norm_bias": (norm_bias, (channels,)),
    }
    given = f"u {tuple(u.shape)}, timescale {tuple(timescale.shape)} and A {tuple(A.shape)}"
    check_shapes("scan_low_rank", given, expected)
    check_reading("scan_low_rank", directions, reverse, order, delta_scale, repeats)
    if norm_bias is not None and norm_weight is None:
        raise UserError("scan_low_rank: got norm_bias without norm_weight: give both, or neither for no norm.")
    backward = [int(r) for r in reverse]
    apart = norm_weight is not None and autocasts()  # the norm is in float32, the scan in the dtype of u
    norm = (None, None) if apart else (norm_weight, norm_bias)
    options = order, gap, delta_scale, repeats, *norm, eps, backward, " ".join(emitted(stats))
    y, sums = SCAN_LOW_RANK(u, low_rank, timescale, A, D, delta_bias, *options)
    y = F.layer_norm(y, (channels,), norm_weight, norm_bias, eps) if apart else y
    return y, as_asked(sums, stats)


def _projected(
    u: Tensor,
    low_rank: Tensor,
    timescale: Tensor,
    A: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    order: Tensor | None,
    gap: Tensor | None,
    delta_scale: Tensor | None,
    repeats: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    reverse: Sequence[int],
    names: str,
) -> tuple[Tensor, Tensor]:
    """Project Δ, then scan."""
    rank, states = timescale.shape[2], A.shape[2]
    low_rank, b, c = low_rank.split([rank, states, states], dim=-1)
    delta = torch.bmm(low_rank.flatten(1, 2), timescale.transpose(1, 2)).unflatten(1, u.shape[:2])  # (G, B, L, E)
    backward = [bool(r) for r in reverse]
    y, sums = selective_scan(
        u.expand(len(timescale), *u.shape), delta, A, b, c, D, delta_bias=delta_bias, reverse=backward, order=order,
        gap=gap, delta_scale=delta_scale, repeats=repeats, stats=names.split(),
    )  # fmt: skip
    return y if norm_weight is None else F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias, eps), sums


def _triton(*inputs: Any) -> tuple[Tensor, Tensor]:
    from mtr_lab.ops.gpu import scan_tiles

    u, low_rank, timescale, A, D, delta_bias, order, gap, delta_scale, repeats, *norm, eps, reverse, names = inputs
    images, length, _ = u.shape
    if order is None:
        forward = torch.arange(length, device=u.device)
        order = torch.stack([forward.flip(0) if back else forward for back in reverse])[:, None].expand(-1, images, -1)
    factor = delta_scale if repeats is None else repeats
    return scan_tiles.scan(
        u.contiguous(), low_rank if low_rank.stride(3) == 1 else low_rank.contiguous(),
        timescale.to(low_rank.dtype).contiguous(), A.float().contiguous(), D.float().contiguous(),
        delta_bias.float().contiguous(), order if order.stride(2) == 1 else order.contiguous(),
        None if gap is None else gap.contiguous(), None if factor is None else factor.float().contiguous(),
        *norm, eps=eps, repeats=repeats is not None, stats=names.split(),
    )  # fmt: skip


def _unfit(*inputs: Any) -> str:
    if inputs[3].shape[2] > MAX_STATES:
        return f"scans at most {MAX_STATES} states in tiles"
    return lacks_gradient("a scan in tiles", *inputs)


def _like_result(u: Tensor, low_rank: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(u.dtype, torch.float32)
    return u.new_empty(u.shape), u.new_empty(*low_rank.shape[:3], len(inputs[-1].split()), dtype=dtype)


SCAN_LOW_RANK = Operation(
    "scan_low_rank",
    [
        Implementation("triton", _triton, unfit=_unfit, package="triton"),
        Implementation("portable", _projected, composed=True),
    ],
    schema=(
        "Tensor u, Tensor low_rank, Tensor timescale, Tensor A, Tensor D, Tensor delta_bias, Tensor? order, "
        "Tensor? gap, Tensor? delta_scale, Tensor? repeats, Tensor? norm_weight, Tensor? norm_bias, float eps, "
        "int[] reverse, str stats",
        "(Tensor, Tensor)",
    ),
    fake=_like_result,
    strict=False,
)


@register_flop_formula(torch.ops.mtr_lab.scan_low_rank)
def scan_low_rank_flops(  # type: ignore[no-untyped-def]
    u_shape, low_rank_shape, timescale_shape, A_shape, D, delta_bias, order, gap, delta_scale, repeats, *args, **kwargs
) -> int:
    """Those of the projection of Δ and of ``selective_scan``."""
    paths, channels, rank = timescale_shape
    images, length, _ = u_shape
    projection = 2 * paths * images * length * channels * rank
    scan = selective_scan_flops((paths, *u_shape), None, A_shape, *(None,) * 8, repeats)
    return projection + scan
