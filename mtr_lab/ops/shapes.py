"""Checks of arguments that several operations share: kernels do not check bounds."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtr_lab.errors import UserError


def check_shapes(operation: str, given: str, expected: Mapping[str, tuple[Tensor | None, Sequence[int]]]) -> None:
    """Check the shape of each tensor by name; ``None`` has any.

    Args:
        given: what the expected shapes are derived from, as "u of shape (2, 3, 4)".

    Raises:
        UserError: a shape does not match.
    """
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != tuple(shape):
            raise UserError(
                f"{operation}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)} for {given}: "
                "reshape one of them."
            )


def check_reading(
    operation: str,
    directions: int,
    reverse: Sequence[int],
    order: Tensor | None,
    delta_scale: Tensor | None,
    repeats: Tensor | None,
) -> None:
    """Check how a scan reads the tokens; arguments as of ``selective_scan``.

    Raises:
        UserError: ``reverse`` of another length, an ``order`` of another dtype or with ``reverse``, or ``repeats``
            with ``delta_scale``.
    """
    if len(reverse) != directions:
        raise UserError(
            f"{operation}: reverse={tuple(reverse)}, expected an entry for each of the {directions} directions of u."
        )
    if order is not None and order.dtype != torch.int64:
        raise UserError(f"{operation}: order has dtype {order.dtype}, expected torch.int64.")
    if order is not None and any(reverse):
        raise UserError(
            f"{operation}: reverse={tuple(reverse)} with an order, expected all 0: reverse the rows of order instead."
        )
    if repeats is not None and delta_scale is not None:
        raise UserError(f"{operation}: got repeats and delta_scale, expected one of them: set the other to None.")
