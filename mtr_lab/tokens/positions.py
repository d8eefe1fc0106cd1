"""Where a mixer's tokens are, for mixers that care."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mtr_lab.tokens import grid, paths
from mtr_lab.tokens.paths import ScanPath
from mtr_lab.tokens.state import TokenState


@dataclass(frozen=True)
class Positions:
    """What a block tells its mixer beside the normalised tokens.

    Args:
        state: of the tokens the mixer is given; ``None`` for an unreduced sequence that is scanned along raster paths.
        aligned: let the scan's state decay over the places of removed tokens.
        size_exponent: Δ of a token is multiplied by its size to this power.
        choose_paths: picks the paths to scan from a mixer's own; ``None`` for all of them.
    """

    state: TokenState | None = None
    aligned: bool = False
    size_exponent: float = 0.0
    choose_paths: Callable[[Sequence[ScanPath]], Sequence[ScanPath]] | None = None

    def select_paths(self, along: Sequence[ScanPath]) -> Sequence[ScanPath]:
        """Those of a mixer's paths that it is to scan."""
        return along if self.choose_paths is None else self.choose_paths(along)

    def scan_arguments(self, along: Sequence[ScanPath]) -> dict[str, Any]:
        """What ``mtr_lab.ops.scan`` has to know about these paths, by its arguments' names."""
        read = self.order(along)
        return {
            "reverse": [path.reverse and read is None for path in along],
            "order": read,
            "gap": self.gap(along),
            "stretch": self.delta_scale,
        }

    def order(self, along: Sequence[ScanPath]) -> Tensor | None:
        """The tokens in the order of each path, (G, B, L), ``None`` for raster paths; see ``tokens.paths.order``."""
        return None if self.state is None else paths.order(self.state, along)

    def gap(self, along: Sequence[ScanPath]) -> Tensor | None:
        """How many tokens are missing before each step of each path, (B, G, L), if the scan is ``aligned``."""
        return paths.gap(self.state, along) if self.state is not None and self.aligned else None

    @property
    def delta_scale(self) -> Tensor | None:
        """(B, L), what Δ of each token is multiplied by; ``None`` for 1."""
        return self.state.size**self.size_exponent if self.state is not None and self.size_exponent else None

    def convolve(self, values: Tensor, conv: nn.Conv2d) -> Tensor:
        """(B, L, C) -> (B, L, C'), a convolution over the grid; see ``tokens.grid.convolve``."""
        if self.state is None:
            raise ValueError("a convolution over the grid needs the state of the tokens")
        return grid.convolve(values, self.state, conv)
