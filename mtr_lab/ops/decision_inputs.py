"""The arguments of every implementation of the decisions."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class DecisionInputs(NamedTuple):
    """The arguments of ``asymmetric_plan``. B images, L tokens, C channels, S special tokens."""

    terms: Tensor
    """(B, K, L), summed and divided by ``scale`` to the score of each token, as in ``importance``."""
    scale: float
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which is not used
    """(B, L) int64, ascending: the original position of each token."""
    size: Tensor
    """(B, L) float32: the number of original tokens each token stands for."""
    special: Tensor
    """(B, S) int64: the positions of tokens that are neither removed nor merged into."""
    hidden: Tensor | None
    """(B, L, C). Tokens are compared by the cosine of ``hidden + residual``, or of the one that is given. Without both,
    the removed tokens are dropped."""
    residual: Tensor | None
    remove: int
    """The number of tokens to remove from each image: those of the lowest scores, of equal scores the earlier."""
    targets: int
    """The number of merge targets in each image: the tokens of the next lowest scores."""
    by_size: bool
    """Whether merged tokens are averaged with their sizes as weights, or with equal weights."""


class NeighbourInputs(NamedTuple):
    """The arguments of ``neighbour_plan``. B images, L tokens, C channels, S special tokens."""

    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which is not used
    """(B, L) int64, ascending: the original position of each token."""
    size: Tensor
    """(B, L) float32: the number of original tokens each token stands for."""
    special: Tensor
    """(B, S) int64: the positions of tokens that are neither removed nor merged into."""
    weight: Tensor | None
    """(B, L) float32, by which distances are multiplied; ``None`` for the most similar tokens first."""
    hidden: Tensor | None
    """(B, L, C). Tokens are compared by the cosine of ``hidden + residual``, or of the one that is given."""
    residual: Tensor | None
    remove: int
    """The number of tokens to remove from each image."""
    by_size: bool
    """Whether merged tokens are averaged with their sizes as weights, or with equal weights."""
    axes: Sequence[int]
    """The size of the grid of original positions along each axis: ([[frames,] rows,] columns)."""


def stream_of(hidden: Tensor | None, residual: Tensor | None) -> Tensor | None:
    """The features that tokens are compared by: the sum of the given streams, in float32 (float64 for float64)."""
    if hidden is None or residual is None:
        return residual if hidden is None else hidden
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32)) + residual
