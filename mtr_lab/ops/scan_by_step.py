"""A selective scan along several paths of which the input alone follows the path, as in PlainMamba.

Shapes: G paths, B images, L tokens, E = d_inner channels, N = d_state. The kernels compute Δ and the decay of a step
once for all paths. Without them and with gradients, ``selective_scan`` reads copies of Δ, B and C.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.errors import UserError
from mtr_lab.ops.registry import Implementation, Operation, lacks_gradient
from mtr_lab.ops.scan import selective_scan, selective_scan_flops
from mtr_lab.ops.shapes import check_shapes
from mtr_lab.ops.statistics import as_asked, check_statistics, emitted

MAX_PATHS = 4
"""Paths that the Triton kernel scans at most."""


def scan_by_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    order: Tensor,
    steps: Tensor,
    moves: Tensor,
    delta_bias: Tensor,
    z: Tensor | None = None,
    stats: Sequence[str] = (),
) -> tuple[Tensor, Tensor]:
    """Step s of path g reads the input of token ``order[g, s]`` with Δ and C of token s and B of token s + its move.

    The recurrence is that of ``mtr_lab.ops.selective_scan``, with the same A, D and bias for all paths.

    Args:
        u: input, (B, L, E).
        delta: timescale before bias and softplus, (B, L, E).
        A: state matrix, negative, (E, N).
        B, C: input and output projections, (B, L, N).
        D: skip connection, (E,).
        order: (G, L) int64, the tokens in the order of each path. Its values are not checked.
        steps: (G, L) int64, the step at which each path reads each token: the inverse of ``order``.
        moves: (G, L, N), in reading order, added to B.
        delta_bias: (E,).
        z: gate before its SiLU, (B, L, E); ``None`` for no gate.
        stats: names from ``STATS``; of the token whose input is read.

    Returns:
        y: (B, L, E), the gated sum over the paths.
        sums: (G, B, L, len(stats)), as of ``selective_scan``.

    Raises:
        UserError: shapes that do not match, ``order`` or ``steps`` of another dtype, or an unknown name in ``stats``.
    """
    check_statistics(stats)
    if u.ndim != 3 or A.ndim != 2 or order.ndim != 2:
        shapes = tuple(u.shape), tuple(A.shape), tuple(order.shape)
        raise UserError(f"scan_by_step: expected u (B, L, E), A (E, N) and order (G, L), got {shapes}.")
    images, length, channels = u.shape
    paths, states = len(order), A.shape[1]
    expected = {
        "delta": (delta, u.shape),
        "A": (A, (channels, states)),
        "B": (B, (images, length, states)),
        "C": (C, (images, length, states)),
        "D": (D, (channels,)),
        "order": (order, (paths, length)),
        "steps": (steps, (paths, length)),
        "moves": (moves, (paths, length, states)),
        "delta_bias": (delta_bias, (channels,)),
        "z": (z, u.shape),
    }
    check_shapes("scan_by_step", f"u of shape {tuple(u.shape)}", expected)
    for name, index in (("order", order), ("steps", steps)):
        if index.dtype != torch.int64:
            raise UserError(f"scan_by_step: {name} has dtype {index.dtype}, expected torch.int64.")
    y, sums = SCAN_BY_STEP(u, delta, A, B, C, D, order, steps, moves, z, delta_bias, " ".join(emitted(stats)))
    return y, as_asked(sums, stats)


def _copied(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    order: Tensor,
    steps: Tensor,
    moves: Tensor,
    z: Tensor | None,
    delta_bias: Tensor,
    names: str,
) -> tuple[Tensor, Tensor]:
    """One operation after the other."""
    paths, images, length = len(order), *u.shape[:2]
    first = length * torch.arange(images, device=u.device)[:, None]  # row of the first token of each image
    rows = (steps[:, None] + first).flatten()
    read = paths, images, length
    delta, B, C = (x.flatten(0, 1).index_select(0, rows).view(*read, x.shape[2]) for x in (delta, B, C))
    B = B + moves.gather(1, steps[..., None].expand_as(moves))[:, None]
    A, D, bias = (x.expand(paths, *x.shape) for x in (A, D, delta_bias))
    along, u = order[:, None].expand(-1, images, -1), u.expand(paths, *u.shape)
    return selective_scan(u, delta, A, B, C, D, z=z, delta_bias=bias, order=along, stats=names.split())


def _unfit_for_cpu(*inputs: Any) -> str:
    compiling = torch.compiler.is_compiling()
    return "runs no scan by steps in a graph" if compiling else lacks_gradient("a scan by steps", *inputs)


def _unfit_for_gpu(*inputs: Any) -> str:
    if len(inputs[6]) > MAX_PATHS:
        return f"scans at most {MAX_PATHS} paths"
    return lacks_gradient("a scan by steps", *inputs)


def _like_result(u: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    order, names = inputs[5], inputs[-1]
    dtype = torch.promote_types(u.dtype, torch.float32)
    return u.new_empty(u.shape), u.new_empty(len(order), *u.shape[:2], len(names.split()), dtype=dtype)


def _run_kernel(*inputs: Any) -> tuple[Tensor, Tensor]:
    u, delta, A, B, C, D, order, _, moves, z, delta_bias, names = inputs
    from mtr_lab.ops.cpu import scan_by_step

    return scan_by_step.scan_by_step(u, delta, A, B, C, D, order, moves, z, delta_bias, names.split())


def _triton(*inputs: Any) -> tuple[Tensor, Tensor]:
    from mtr_lab.ops.gpu import scan_by_step

    u, delta, A, B, C, D, order, _, moves, z, delta_bias, names = inputs
    paths, states = len(order), A.shape[1]
    more = (1 << (states - 1).bit_length()) - states  # states that stay zero
    B, C, moves, A = (F.pad(x, (0, more)) if more else x for x in (B, C, moves, A))
    moved = B[:, :, None] + moves.to(B.dtype).transpose(0, 1)  # (B, L, G, N)
    moved = F.pad(moved, (0, 0, 0, MAX_PATHS - paths)) if paths < MAX_PATHS else moved
    return scan_by_step.scan(
        u.contiguous(), delta.contiguous(), A.float().mT.contiguous(), moved.contiguous(),
        C if C.stride(2) == 1 else C.contiguous(), D.float().contiguous(), delta_bias.float().contiguous(),
        order.contiguous(), z, names.split(),
    )  # fmt: skip


SCAN_BY_STEP = Operation(
    "scan_by_step",
    [
        Implementation("triton", _triton, unfit=_unfit_for_gpu, package="triton"),
        Implementation("cpu", _run_kernel, unfit=_unfit_for_cpu),
        Implementation("portable", _copied, composed=True),
    ],
    schema=(
        "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor order, Tensor steps, Tensor moves, "
        "Tensor? z, Tensor delta_bias, str stats",
        "(Tensor, Tensor)",
    ),
    fake=_like_result,
    strict=False,
)


@register_flop_formula(torch.ops.mtr_lab.scan_by_step)
def scan_by_step_flops(u_shape, delta_shape, A_shape, B, C, D, order_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """Those of ``selective_scan``."""
    paths = order_shape[0]
    return selective_scan_flops((paths, *u_shape), None, (paths, *A_shape), *(None,) * 9)
