"""Gather tokens by position."""

from torch import Tensor


def take(tokens: Tensor, positions: Tensor) -> Tensor:
    """Tokens (B, L, C) at positions (B, M): (B, M, C)."""
    return tokens.gather(1, positions[..., None].expand(-1, -1, tokens.shape[-1]))


def take_or_zero(tokens: Tensor, positions: Tensor) -> Tensor:
    """As ``take``; zero where a position is -1."""
    return take(tokens, positions.clamp(min=0)).masked_fill((positions < 0)[..., None], 0)
