"""Where a mixer's tokens are, for mixers that care."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mtr_lab.tokens import grid, paths
from mtr_lab.tokens.paths import Path
from mtr_lab.tokens.state import TokenState


@dataclass(frozen=True)
class Positions:
    """What a block tells its mixer beside the normalised tokens.

    Args:
        state: of the tokens the mixer is given.
        aligned: let the scan's state decay over the places of removed tokens.
        exponent: Δ of a token is multiplied by its size to this power.
    """

    state: TokenState
    aligned: bool = False
    exponent: float = 0.0

    def order(self, along: Sequence[Path]) -> Tensor | None:
        """The tokens in the order of each path, (G, B, L), ``None`` for raster paths; see ``tokens.paths.order``."""
        return paths.order(self.state, along)

    def gap(self, along: Sequence[Path]) -> Tensor | None:
        """How many tokens are missing before each step of each path, (B, G, L), if the scan is ``aligned``."""
        return paths.gap(self.state, along) if self.aligned else None

    @property
    def stretch(self) -> Tensor | None:
        """(B, L), what Δ of each token is multiplied by; ``None`` for 1."""
        return self.state.size**self.exponent if self.exponent else None

    def convolve(self, values: Tensor, conv: nn.Conv2d) -> Tensor:
        """(B, L, C) -> (B, L, C'), a convolution over the grid; see ``tokens.grid.convolve``."""
        return grid.convolve(values, self.state, conv)
