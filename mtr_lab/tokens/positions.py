"""The positions of the tokens that a block gives to its mixer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mtr_lab import ops
from mtr_lab.tokens import grid, paths
from mtr_lab.tokens.gather import take
from mtr_lab.tokens.layout import Layout
from mtr_lab.tokens.paths import ScanPath
from mtr_lab.tokens.state import Evidence, TokenState


@dataclass(frozen=True)
class Positions:
    """What a block tells its mixer beside the normalised tokens.

    Args:
        state: of the mixer's tokens; ``None`` for an unreduced sequence that is scanned along raster paths.
        aligned: let the scan's state decay over the positions of removed tokens.
        size_exponent: Δ of a token is multiplied by its size to this power.
        repeated: scan a token as a run of as many equal tokens as its size.
        choose_paths: the paths of a mixer -> those to scan; ``None`` to scan all of them.
        unmerged: let a convolution along the sequence run over the original positions of the tokens.
        pruned: whether tokens may have been dropped, not merged.
        sampled: scan one of each 2 x 2 tokens of the grid.
        read: (B, S), the positions of the tokens whose output alone is read; ``None``: that of all tokens.
        is_last: whether no block follows, so that the streams may be of the tokens at ``read`` alone.
        decide: the evidence of the scan -> the plan that merges tokens before the output projection; ``None``: none is.
    """

    state: TokenState | None = None
    aligned: bool = False
    size_exponent: float = 0.0
    repeated: bool = False
    choose_paths: Callable[[Sequence[ScanPath]], Sequence[ScanPath]] | None = None
    unmerged: bool = False
    pruned: bool = False
    sampled: bool = False
    read: Tensor | None = None
    is_last: bool = False
    decide: Callable[[Evidence], ops.Plan] | None = None

    def select_paths(self, available: Sequence[ScanPath]) -> Sequence[ScanPath]:
        """The paths to scan, of all paths of a mixer."""
        return available if self.choose_paths is None else self.choose_paths(available)

    def scan_arguments(self, scanned: Sequence[ScanPath]) -> dict[str, Any]:
        """The arguments of ``mtr_lab.ops.selective_scan`` that describe these paths."""
        order = self.order(scanned)
        return {
            "reverse": [path.reverse and order is None for path in scanned],
            "order": order,
            "gap": self.gap(scanned),
            "delta_scale": self.delta_scale,
            "repeats": self.repeats,
        }

    def neighbours(self) -> dict[str, Any]:
        """``index`` and ``source`` as ``mtr_lab.ops.causal_conv1d`` takes them; ``None`` to convolve over the tokens.

        Dropped tokens are left out: their neighbours are neighbours now.
        """
        state = self.state
        if not self.unmerged or state is None or state.source is None or state.index.shape == state.source.shape:
            return {"index": None, "source": None}
        index, source = state.index, state.source
        if self.pruned:
            batch, positions = source.shape
            rank = (source >= 0).cumsum(1) - 1  # of each position, without those of dropped tokens
            index = rank.gather(1, index)
            last = rank.masked_fill(source < 0, positions)
            source = source.new_full((batch, positions + 1), -1).scatter(1, last, source)
        return {"index": index, "source": source}

    def streams(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The streams after a mixer, of its output (B, L, C), or (B, S, C) of the tokens at ``read`` alone.

        Of these alone after the last block. Before it the other tokens' outputs are 0: their streams stay the same.
        """
        if self.read is None:
            return hidden, residual
        if self.is_last:
            return hidden, take(residual, self.read)
        rows = self.read[..., None].expand_as(hidden)
        return hidden.new_zeros(residual.shape).scatter(1, rows, hidden), residual

    def order(self, scanned: Sequence[ScanPath]) -> Tensor | None:
        """The tokens in the order of each path, (G, B, L); ``None`` for raster paths. See ``tokens.paths.order``."""
        return None if self.state is None else paths.order(self.state, scanned)

    def pairs(self, scanned: Sequence[ScanPath], *, by_rank: bool = False) -> Tensor:
        """For a scan of which only the input follows the paths: the token that gives each token its Δ, B and C.

        It contains the original position, in raster order, whose number is that of the step at which the token's own
        position is read.

        Args:
            scanned: the G paths.
            by_rank: number steps and tokens among the survivors, instead of their original positions.

        Returns:
            (G, B, L) int64.
        """
        state = self.state
        if state is None:
            raise ValueError("a scan of which only the input follows the paths needs the state of the tokens")
        steps = paths.steps(state, scanned)
        if state.current_layout is not None:
            return steps
        if by_rank:
            order = self.order(scanned)
            assert order is not None
            return state.index.argsort(1).expand_as(order).gather(2, order.argsort(2))
        return grid.containing(state).expand(len(steps), -1, -1).gather(2, steps)

    def moves(self, scanned: Sequence[ScanPath]) -> Tensor:
        """The move over the grid that leads to each token on each path, (G, B, L); see ``tokens.paths.moves``."""
        if self.state is None:
            raise ValueError("moves over the grid need the state of the tokens")
        return paths.moves(self.state, scanned)

    def walk(self, scanned: Sequence[ScanPath]) -> tuple[Tensor, Tensor, Tensor] | None:
        """Tokens, steps and moves of paths over a full grid, (G, L) int64 each; see ``tokens.paths.walk``.

        ``None`` if some positions have no token, and for a scan with gaps, factors of Δ or repeated tokens.
        """
        state = self.state
        layout = None if state is None else state.current_layout
        if state is None or layout is None or self.aligned or self.size_exponent or self.repeats is not None:
            return None
        return paths.walk(layout, scanned, state.index.device)

    def gap(self, scanned: Sequence[ScanPath]) -> Tensor | None:
        """The number of removed tokens before each step of each path, (B, G, L); ``None`` unless ``aligned``."""
        return paths.gap(self.state, scanned) if self.state is not None and self.aligned else None

    def sample(self, values: Tensor) -> tuple[Tensor, "Positions"]:
        """The values (B, L, C) of the tokens to scan, and their positions: all tokens, unless ``sampled``."""
        if not self.sampled:
            return values, self
        whole = self._whole()
        assert self.state is not None
        values = grid.sample(values, whole)
        size = grid.sample(self.state.size[..., None], whole)[..., 0]
        state = TokenState.start(values, (), whole.sampled)._replace(size=size)
        return values, replace(self, state=state, sampled=False)

    def spread(self, values: Tensor) -> Tensor:
        """The inverse of ``sample``, (B, L, C): every token takes the value of the one scanned for its 2 x 2."""
        return grid.spread(values, self._whole()) if self.sampled else values

    def _whole(self) -> Layout:
        layout = None if self.state is None else self.state.current_layout
        if layout is None or layout.special:
            raise ValueError("one of each 2 x 2 tokens can be scanned only of a full grid without special tokens")
        return layout

    @property
    def delta_scale(self) -> Tensor | None:
        """(B, L), the factor of Δ of each token; ``None`` for 1."""
        if self.state is None or not self.size_exponent:
            return None
        scale = self.state.delta_scale
        return self.state.size**self.size_exponent if scale is None else scale

    @property
    def repeats(self) -> Tensor | None:
        """(B, L), the number of equal tokens that each token stands for; ``None`` for 1."""
        state = self.state
        if not self.repeated or state is None or (state.layout and state.index.shape[1] == state.layout.tokens):
            return None
        return state.size

    def merged(self, values: Tensor, evidence: Evidence) -> tuple[Tensor, Evidence]:
        """The mixer's tokens (B, L, E), merged if the policy merges them here, and the evidence with its plan.

        A mixer that calls it before a linear output projection without a bias has ``merged_width`` = E. The projection
        then runs on the M survivors, (B, M, E): it gives what merging its output would give.
        """
        if self.decide is None:
            return values, evidence
        merged, plan = ops.merge_tokens(self.decide(evidence), values)
        return merged, replace(evidence, plan=plan)

    def convolve(self, values: Tensor, conv: Callable[[Tensor], Tensor]) -> Tensor:
        """A convolution over the grid, (B, L, C) -> (B, L, C'); see ``tokens.grid.convolve``."""
        if self.state is None:
            raise ValueError("a convolution over the grid needs the state of the tokens")
        return grid.convolve(values, self.state, conv)
