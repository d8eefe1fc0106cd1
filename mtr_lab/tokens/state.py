"""What flows from block to block, and what a mixer shows about its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mtr_lab import ops
from mtr_lab.tokens.gather import take_or_zero
from mtr_lab.tokens.layout import Layout


class TokenState(NamedTuple):
    """The token sequences between two blocks. B sequences, L tokens, C channels, S special tokens, L0 tokens at first.

    A tuple of tensors, so that autograd, hooks and checkpoints see them: ``state = TokenState(*block(*state))``. All
    sequences hold the same number of tokens, so shapes are static.

    ``index``, ``size``, ``special`` and ``source`` describe the tokens after the last reduction. The two streams are
    reduced when somebody reads them: a norm takes ``raw_hidden``, ``raw_residual`` and ``pending`` and does it on its
    way; ``hidden``, ``residual`` and ``stream`` are as after it.
    """

    raw_hidden: Tensor
    """(B, L', C), the output of the last block (of the embedding, before the first), before ``pending``."""
    raw_residual: Tensor | None
    """(B, L', C) in float32, the stream ``raw_hidden`` is still to be added to; ``None`` before the first block."""
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which is not used
    """(B, L) int64, the original position of each token."""
    size: Tensor
    """(B, L) float32, how many original tokens each token stands for."""
    special: Tensor
    """(B, S) int64, where the special tokens (class token, registers) are now; they differ between sequences."""
    source: Tensor | None = None
    """(B, L0) int64, the token each original position has become part of, -1 if it was dropped; where it is tracked."""
    pending: ops.Plan | None = None
    """The plan that reduces ``raw_hidden`` and ``raw_residual`` to the L tokens; ``None`` if they are as long."""
    layout: Layout | None = None
    """What the original positions are; ``None`` if nobody asks."""
    offset: Tensor | None = None
    """(B, L0, C), by how much each original position differed from the token that it became part of when it did; a
    dropped one from zero. Where it is tracked, for the restoration ``skip``."""

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
        # Filled on the device: a copy from the host would keep the forward pass out of a CUDA graph.
        places = [torch.full((batch, 1), place, device=tokens.device) for place in special]
        positions = torch.cat(places or [index[:, :0]], dim=1)
        return cls(tokens, None, index, size, positions, layout=layout)

    def with_streams(self, hidden: Tensor, residual: Tensor | None) -> "TokenState":
        """The same tokens with other streams, of L tokens each."""
        return self._replace(raw_hidden=hidden, raw_residual=residual, pending=None)

    def reduced(self, plan: ops.Plan) -> "TokenState":
        """The survivors of a plan; their streams follow when somebody reads them."""
        state = self.applied()
        index, size, special = ops.update_metadata(plan, state.index, state.size, state.special)
        source = state.source
        if source is not None:
            source = torch.where(source < 0, -1, plan.dest.gather(1, source.clamp(min=0)))
        after = state._replace(index=index, size=size, special=special, source=source, pending=plan)
        if state.offset is None:
            return after
        assert state.source is not None
        assert source is not None
        after = after.applied()
        was = take_or_zero(state.stream, state.source) + state.offset
        return after._replace(offset=was - take_or_zero(after.stream, source))

    def traced(self) -> "TokenState":
        """The same state, before any reduction, from which on ``source`` is tracked."""
        return self._replace(source=self.index)

    def tracking_offset(self) -> "TokenState":
        """The same state, traced and before any reduction, from which on the offset is tracked."""
        assert self.source is not None
        nothing = torch.zeros(1, 1, 1, device=self.raw_hidden.device)
        return self._replace(offset=nothing.expand(*self.source.shape, self.raw_hidden.shape[-1]))

    def applied(self) -> "TokenState":
        """The same state with the pending plan applied, for those who read the streams more than once."""
        if self.pending is None:
            return self
        return self.with_streams(*ops.reduce_streams(self.pending, self.raw_hidden, self.raw_residual))

    @property
    def hidden(self) -> Tensor:
        """(B, L, C), the output of the last block (of the embedding, before the first)."""
        return self.applied().raw_hidden

    @property
    def residual(self) -> Tensor | None:
        """(B, L, C) in float32 (or float64), the stream ``hidden`` is still to be added to; ``None`` before the first
        block."""
        return self.applied().raw_residual

    @property
    def stream(self) -> Tensor:
        """(B, L, C) in float32 (or float64), the residual stream after the last block, which the next norm reads."""
        hidden, residual = self.applied()[:2]
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return wide if residual is None else wide + residual

    def special_tokens(self) -> Tensor:
        """The special tokens of ``stream``, gathered at their exact positions: (B, S, C)."""
        hidden, residual = self.applied()[:2]
        rows = self.special[..., None].expand(-1, -1, hidden.shape[-1])
        special = hidden.gather(1, rows)
        return special if residual is None else special + residual.gather(1, rows)


@dataclass(frozen=True)
class Evidence:
    """What a mixer shows about its tokens at no extra pass, for each direction in which it scans them.

    ``sums`` is (B, G, L, K), the per-token sums of ``mtr_lab.ops.STATS`` named by ``names``, at the token's own
    position. ``b`` and ``c`` are the input and output projections (B, G, L, N), ``None`` unless asked for.
    ``directions`` are the names of the G directions.
    """

    sums: Tensor
    names: tuple[str, ...]
    channels: int
    b: Tensor | None = None
    c: Tensor | None = None
    directions: tuple[str, ...] = ("forward", "backward")

    def __post_init__(self) -> None:
        if len(self.directions) != self.sums.shape[1]:
            raise ValueError(f"evidence of {self.sums.shape[1]} directions has the names {self.directions}")

    @classmethod
    def none(cls, hidden: Tensor) -> "Evidence":
        """Of a mixer that does not scan its tokens (B, L, C)."""
        return cls(hidden.new_empty(hidden.shape[0], 0, hidden.shape[1], 0), (), 0, directions=())

    def along(self, direction: str) -> "Evidence":
        """The evidence of one direction by its name."""
        at = self.directions.index(direction)
        b, c = (None if t is None else t[:, at : at + 1] for t in (self.b, self.c))
        return replace(self, sums=self.sums[:, at : at + 1], b=b, c=c, directions=(direction,))

    def of(self, keep: Tensor) -> "Evidence":
        """The evidence of the tokens at positions ``keep`` (B, M): the survivors of a plan."""

        def kept(values: Tensor) -> Tensor:  # (B, G, L, K)
            return values.gather(2, keep[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3]))

        b, c = (None if t is None else kept(t) for t in (self.b, self.c))
        return replace(self, sums=kept(self.sums), b=b, c=c)

    def projection(self, name: str) -> Tensor:
        """``b`` or ``c``, (B, G, L, N)."""
        projection = {"b": self.b, "c": self.c}[name]
        if projection is None:
            raise KeyError(f"the projection {name!r} was not asked for")
        return projection

    def __getitem__(self, name: str) -> Tensor:
        """One sum over the channels, (B, G, L) float32."""
        return self.sums[..., self.names.index(name)]
