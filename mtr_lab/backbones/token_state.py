"""What flows from block to block, and what a block shows about its tokens."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mtr_lab import ops


class TokenState(NamedTuple):
    """The token sequence between two blocks. B images, L tokens, C channels, S special tokens, L0 tokens at the input.

    A tuple of tensors, so that autograd, hooks and checkpoints see them: ``state = TokenState(*block(*state))``.

    Every image of a batch holds the same number of tokens, so all shapes are static. A reduction is decided after a
    block, and carried out on the two streams by the next norm on its way: until then ``plan`` holds it and the
    streams are as long as before. ``settled`` carries it out at once.
    """

    hidden: Tensor
    """(B, L, C), the output of the last block (of the embedding, before the first)."""
    residual: Tensor | None
    """(B, L, C) in float32, the stream ``hidden`` is still to be added to; ``None`` before the first block."""
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which is not used
    """(B, L) int64, the original position of each token."""
    size: Tensor
    """(B, L) float32, how many original tokens each token stands for."""
    special: Tensor
    """(B, S) int64, where the protected tokens (class token, registers) are now, image by image."""
    source: Tensor | None = None
    """(B, L0) int64 if traced: the token each original token has become part of, -1 if it was dropped."""
    plan: ops.Plan | None = None
    """A reduction that is still to be carried out on ``hidden`` and ``residual``; all else is as it will be then."""

    @classmethod
    def start(cls, tokens: Tensor, special: list[int], *, traced: bool = False) -> "TokenState":
        """The state before the first block: ``tokens`` (B, L, C), protected tokens at the positions ``special``."""
        batch, length = tokens.shape[:2]
        index = torch.arange(length, device=tokens.device).expand(batch, length)
        size = torch.ones(length, device=tokens.device).expand(batch, length)
        # Filled on the device: a copy from the host would keep the forward pass out of a CUDA graph.
        places = [torch.full((batch, 1), place, device=tokens.device) for place in special]
        positions = torch.cat(places or [index[:, :0]], dim=1)
        return cls(tokens, None, index, size, positions, index if traced else None)

    def settled(self) -> "TokenState":
        """The same with nothing left to be carried out."""
        if self.plan is None:
            return self
        hidden, residual = ops.reduce_streams(self.plan, self.hidden, self.residual)
        return self._replace(hidden=hidden, residual=residual, plan=None)

    @property
    def stream(self) -> Tensor:
        """(B, L, C) in float32 (or float64): the residual stream after the last block, which the next norm sees."""
        state = self.settled()
        wide = state.hidden.to(torch.promote_types(state.hidden.dtype, torch.float32))
        return wide if state.residual is None else wide + state.residual

    def special_tokens(self) -> Tensor:
        """The protected tokens of ``stream``, gathered at their exact positions: (B, S, C)."""
        state = self.settled()
        rows = state.special[..., None].expand(-1, -1, state.hidden.shape[-1])
        if state.residual is None:
            return state.hidden.gather(1, rows)
        return state.hidden.gather(1, rows) + state.residual.gather(1, rows)


@dataclass(frozen=True)
class Evidence:
    """What a mixer shows about its tokens at no extra pass, for each scan direction.

    ``sums`` is (B, G, L, K), the per-token sums of ``mtr_lab.ops.STATS`` named by ``names``, each at the token's own
    position. ``b`` and ``c`` are the input and output projections (B, G, L, N), ``None`` unless asked for.
    """

    sums: Tensor
    names: tuple[str, ...]
    channels: int
    b: Tensor | None = None
    c: Tensor | None = None

    def projection(self, name: str) -> Tensor:
        """``b`` or ``c``, (B, G, L, N)."""
        projection = {"b": self.b, "c": self.c}[name]
        if projection is None:
            raise KeyError(f"the projection {name!r} was not asked for")
        return projection

    def __getitem__(self, name: str) -> Tensor:
        """One sum over the channels, (B, G, L) float32."""
        return self.sums[..., self.names.index(name)]
