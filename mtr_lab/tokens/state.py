"""The tokens between two blocks, and the evidence that a mixer collects about its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mtr_lab import ops
from mtr_lab.tokens.gather import take, take_or_zero
from mtr_lab.tokens.layout import Layout


class TokenState(NamedTuple):
    """The token sequences between two blocks. B sequences, L tokens, C channels, S special tokens, L0 unreduced tokens.

    A tuple of tensors, so that autograd, hooks and checkpoints see them: ``state = TokenState(*block(*state))``. All
    sequences have the same number of tokens, so shapes are static.

    A reduction is applied lazily. ``index``, ``size``, ``special`` and ``source`` describe the tokens after it
    immediately. The streams stay unreduced in ``raw_hidden`` and ``raw_residual``, of L' tokens, until the next norm
    applies ``pending`` in its own kernel. ``hidden``, ``residual`` and ``stream`` return reduced streams.
    """

    raw_hidden: Tensor
    """(B, L', C), the output of the last block (before the first block, of the embedding), before ``pending``; or
    (B, L, C), if the block has merged its tokens before its output projection."""
    raw_residual: Tensor | None
    """(B, L', C) in float32 (float64 in a float64 model), the residual stream without ``raw_hidden``; ``None`` before
    the first block."""
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which is not used
    """(B, L) int64, the position of each token before any reduction of this stage."""
    size: Tensor
    """(B, L) float32, the number of original tokens that each token stands for."""
    special: Tensor
    """(B, S) int64, the current positions of the special tokens (class token, registers), which differ between
    sequences."""
    source: Tensor | None = None
    """(B, L0) int64, the token that contains each original position, -1 if it was dropped; ``None`` if not tracked."""
    pending: ops.Plan | None = None
    """The plan that reduces ``raw_hidden`` and ``raw_residual`` to the L tokens; ``None`` if they are reduced."""
    layout: Layout | None = None
    """The layout of the original positions; ``None`` if it is not needed."""
    offset: Tensor | None = None
    """(B, L0, C), what to add to the stream of the token that now stands for an original position to restore the
    position's vector at the last reduction; for a dropped position it is that vector. ``None`` if not tracked."""
    grid: Layout | None = None
    """The layout of the tokens as they are now, if a reduction has left a full grid, over which mixers go on."""
    special_alone: bool = False
    """Whether a head reads the special tokens alone. The last block may then return streams (B, S, C) of these; the
    other fields are of all tokens still."""
    delta_scale: Tensor | None = None
    """(B, L) float32, the factor of Δ of each token at the last reduction, for all blocks up to the next one; ``None``
    where they compute it from ``size``."""

    @classmethod
    def start(cls, tokens: Tensor, special: Sequence[int], layout: Layout | None = None) -> "TokenState":
        """The state before the first block of a stage.

        Args:
            tokens: (B, L, C).
            special: positions of the special tokens.
            layout: what the positions are.
        """
        batch, length = tokens.shape[:2]
        index = torch.arange(length, device=tokens.device).expand(batch, length)
        size = torch.ones(length, device=tokens.device).expand(batch, length)
        # Parts of the index: a CUDA graph cannot capture a copy from the host, and views launch nothing.
        columns = [index[:, position : position + 1] for position in special]
        positions = columns[0] if len(columns) == 1 else torch.cat(columns or [index[:, :0]], dim=1)
        return cls(tokens, None, index, size, positions, layout=layout)

    def with_streams(self, hidden: Tensor, residual: Tensor | None) -> "TokenState":
        """The same tokens with other streams, (B, L, C) each; nothing is pending for them."""
        return self._replace(raw_hidden=hidden, raw_residual=residual, pending=None)

    def reduced(self, plan: ops.Plan) -> "TokenState":
        """The state of a plan's survivors.

        Metadata is updated now, and a plan that is still pending is applied now. The streams are reduced by the new
        plan when they are next read, or now if ``offset`` is tracked.
        """
        state = self.applied()
        index, size, special = ops.update_metadata(plan, state.index, state.size, state.special)
        source = None if state.source is None else ops.follow(plan, state.source)
        grid = None if plan.grid is None or state.layout is None else state.layout.resized(*plan.grid)
        after = state._replace(index=index, size=size, special=special, source=source, pending=plan, grid=grid)
        after = after._replace(delta_scale=None)
        if state.offset is None:
            return after
        assert state.source is not None
        assert source is not None
        after = after.applied()
        if state.raw_hidden.shape[1] < plan.dest.shape[1]:  # merged inside the block, whose output they share
            assert state.raw_residual is not None
            assert after.raw_residual is not None
            whole, merged = state.raw_residual, after.raw_residual
        else:
            whole, merged = state.stream, after.stream
        restored = take_or_zero(whole, state.source) + state.offset
        return after._replace(offset=restored - take_or_zero(merged, source))

    @property
    def current_layout(self) -> Layout | None:
        """The layout of the tokens as they are now, ``None`` if they form no full grid."""
        whole = self.layout is not None and self.index.shape[1] == self.layout.tokens
        return self.layout if whole else self.grid

    def traced(self) -> "TokenState":
        """This unreduced state, with ``source`` tracked from here on."""
        return self._replace(source=self.index)

    def tracking_offset(self) -> "TokenState":
        """This unreduced, traced state, with ``offset`` tracked from here on."""
        assert self.source is not None
        zero = torch.zeros(1, 1, 1, device=self.raw_hidden.device)
        return self._replace(offset=zero.expand(*self.source.shape, self.raw_hidden.shape[-1]))

    def applied(self) -> "TokenState":
        """This state with the pending plan applied; keep it to read several streams, as each read applies the plan."""
        if self.pending is None:
            return self
        return self.with_streams(*ops.reduce_streams(self.pending, self.raw_hidden, self.raw_residual))

    @property
    def hidden(self) -> Tensor:
        """(B, L, C), the output of the last block (before the first block, of the embedding)."""
        return self.applied().raw_hidden

    @property
    def residual(self) -> Tensor | None:
        """(B, L, C) in float32 or float64, the residual stream without ``hidden``; ``None`` before the first block."""
        return self.applied().raw_residual

    @property
    def stream(self) -> Tensor:
        """(B, L, C) in float32 or float64, the residual stream after the last block: ``hidden`` + ``residual``."""
        hidden, residual = self.applied()[:2]
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32)) if residual is None else residual + hidden

    def special_tokens(self) -> Tensor:
        """The special tokens of ``stream``, (B, S, C)."""
        hidden, residual = self.applied()[:2]
        if self.special_alone and hidden.shape[1] == self.special.shape[1]:
            return self.stream
        special = take(hidden, self.special)
        return special if residual is None else special + take(residual, self.special)


@dataclass(frozen=True)
class Evidence:
    """Statistics of a scan for each token and each of G directions, collected by the mixer in the same pass.

    Args:
        sums: (B, G, L, K), sums over the channels, in token order. (In ``mtr_lab.ops`` directions come first.)
        names: the K statistics, names of ``mtr_lab.ops.STATS``.
        channels: the number of channels that are summed.
        b, c: the input and output projections (B, G, L, N), ``None`` if they were not requested.
        directions: the names of the G directions.
        plan: by which the mixer has merged its tokens already, see ``Positions.merged``; ``None`` if it has not.
    """

    sums: Tensor
    names: tuple[str, ...]
    channels: int
    b: Tensor | None = None
    c: Tensor | None = None
    directions: tuple[str, ...] = ("forward", "backward")
    plan: ops.Plan | None = None

    def __post_init__(self) -> None:
        if len(self.directions) != self.sums.shape[1]:
            raise ValueError(f"evidence of {self.sums.shape[1]} directions has the names {self.directions}")

    @classmethod
    def none(cls, hidden: Tensor) -> "Evidence":
        """The evidence, without statistics, of a mixer that does not scan: for tokens ``hidden`` (B, L, C)."""
        return cls(hidden.new_empty(hidden.shape[0], 0, hidden.shape[1], 0), (), 0, directions=())

    def along(self, direction: str) -> "Evidence":
        """The evidence of one direction by its name."""
        g = self.directions.index(direction)
        b, c = (None if t is None else t[:, g : g + 1] for t in (self.b, self.c))
        return replace(self, sums=self.sums[:, g : g + 1], b=b, c=c, directions=(direction,))

    def projection(self, name: str) -> Tensor:
        """``b`` or ``c``, (B, G, L, N)."""
        projection = {"b": self.b, "c": self.c}[name]
        if projection is None:
            raise KeyError(f"the projection {name!r} was not requested")
        return projection

    def __getitem__(self, name: str) -> Tensor:
        """One sum over the channels, (B, G, L) float32 (float64 in a float64 model)."""
        return self.sums[..., self.names.index(name)]
