"""Which target each candidate source is merged into, and how alike they are."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mtr_lab.tokens import TokenState


def cosine(features: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar target of each source by cosine similarity.

    Args:
        features: (B, L, C).
        source, target: positions (B, A) and (B, T).

    Returns:
        the target of each source, a position (B, A), and their similarity (B, A).
    """

    def unit_rows(index: Tensor) -> Tensor:
        rows = features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))
        return F.normalize(rows.float(), dim=-1)

    similarity, nearest = torch.bmm(unit_rows(source), unit_rows(target).transpose(1, 2)).max(dim=-1)  # of (B, A, T)
    return target.gather(1, nearest), similarity


MATCHINGS = {"cosine": cosine}

FEATURES: dict[str, Callable[[TokenState], Tensor]] = {
    "stream": lambda state: state.stream,
    "hidden": lambda state: state.hidden,
    "residual": lambda state: state.hidden if state.residual is None else state.residual,
}
"""What is compared, (B, L, C): the residual stream after the block, the block's output alone, the stream before it."""
