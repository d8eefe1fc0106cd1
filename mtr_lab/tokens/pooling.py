"""Pooling of tokens for a head; the class token may be anywhere in the sequence."""

import torch
from torch import Tensor

from mtr_lab.errors import unknown
from mtr_lab.tokens.gather import take
from mtr_lab.tokens.state import TokenState

POOLINGS = ("token", "avg", "")
"""``token``: the class token. ``avg``: the mean of the other tokens, weighted by size. ``""``: all tokens, the class
token first."""


def check_pooling(how: str) -> None:
    """Raise a ``UserError`` unless ``how`` is one of ``POOLINGS``."""
    if how not in POOLINGS:
        raise unknown("global_pool", how, map(repr, POOLINGS))


def ordinary_tokens(special: Tensor, length: int) -> Tensor:
    """Positions of the tokens that are not special, ascending: special (B, S) -> (B, L - S)."""
    is_special = torch.zeros(special.shape[0], length, dtype=torch.uint8, device=special.device)
    return is_special.scatter_(1, special, 1).argsort(dim=1, stable=True)[:, : length - special.shape[1]]


def tokens_outside(special: Tensor, length: int, zone: int) -> Tensor:
    """As ``ordinary_tokens``, without the ``zone`` tokens nearest in the sequence to each special one.

    Special tokens that are near to each other share their zones, so that the number is the same in every sequence:
    special (B, S) -> (B, L - S - S · zone).
    """
    if not zone or not special.shape[1]:
        return ordinary_tokens(special, length)
    position = torch.arange(length, device=special.device)
    distance = (position[:, None] - special[:, None]).abs().amin(-1)  # (B, L, S) -> (B, L); 0 for special tokens
    return distance.argsort(dim=1, stable=True)[:, special.shape[1] * (1 + zone) :].sort(dim=1).values


def special_first(tokens: Tensor, special: Tensor) -> Tensor:
    """Tokens (B, L, C) with those at ``special`` (B, S) moved to the front and the others in their order."""
    return take(tokens, torch.cat([special, ordinary_tokens(special, tokens.shape[1])], dim=1))


def mean_by_size(tokens: Tensor, state: TokenState) -> Tensor:
    """Mean (B, C) of the tokens (B, L, C) that are not special, weighted by the sizes in ``state``."""
    weight = state.size.scatter(1, state.special, 0.0)
    mean = (tokens * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    return mean.to(tokens.dtype)


def mean_of_image(tokens: Tensor, state: TokenState) -> Tensor:
    """Mean (B, C) over the positions of an image in all its windows, (B · windows, L, C) tokens.

    A token counts as often as the positions that it stands for; padding does not count.
    """
    layout, weight = state.layout, state.size
    assert layout is not None
    if any(layout.padding):
        counted = layout.cut(weight.new_ones(1, 1, *layout.image_grid)).flatten(1)  # (windows, L0)
        source = state.index if state.source is None else state.source
        counted = counted.expand_as(source.unflatten(0, (-1, layout.sequences))).flatten(0, 1)
        counted = counted.masked_fill(source < 0, 0)
        weight = torch.zeros_like(weight).scatter_add(1, source.clamp(min=0), counted)
    weighted = (tokens * weight[..., None]).unflatten(0, (-1, layout.sequences)).sum((1, 2))
    total = weight.unflatten(0, (-1, layout.sequences)).sum((1, 2))
    return (weighted / total.clamp(min=1)[:, None]).to(tokens.dtype)
