"""The parts a policy is assembled from, by the names its configuration uses.

B images, L tokens, C channels, S special tokens, r tokens to remove, T targets.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mtr_lab.backbones import Evidence, TokenState


def delta_score(state: TokenState, evidence: Evidence) -> Tensor:
    """MTR's importance: the mean over channels of Δ, summed over the scan directions (arXiv 2507.14042): (B, L)."""
    return evidence["delta"].sum(1) / evidence.channels


SCORES: dict[str, tuple[Callable[[TokenState, Evidence], Tensor], tuple[str, ...]]] = {
    "delta": (delta_score, ("delta",)),
}
"""Importance of each token, higher is more important: the function and the evidence it needs."""


def asymmetric_groups(score: Tensor, special: Tensor, remove: int, target_fraction: float) -> tuple[Tensor, Tensor]:
    """MTR's grouping: the least important tokens are sources, the next least important are targets.

    Args:
        score: (B, L).
        special: (B, S) protected tokens, never a source nor a target.
        remove: r, the number of sources.
        target_fraction: share of the other tokens that are targets (at least one).

    Returns:
        source (B, r) and target (B, T) positions, each in ascending order of importance.
    """
    ranked = score.scatter(1, special, torch.inf).argsort(dim=1, stable=True)
    targets = num_targets(score.shape[1], special.shape[1], remove, target_fraction)
    return ranked[:, :remove], ranked[:, remove : remove + targets]


def num_targets(length: int, special: int, remove: int, target_fraction: float) -> int:
    """T, how many of the ``length - special - remove`` surviving ordinary tokens are targets."""
    return max(1, round(target_fraction * (length - special - remove)))


GROUPINGS = {"asymmetric": asymmetric_groups}


def cosine_match(features: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The most similar target of each source by cosine similarity: features (B, L, C) -> positions (B, r)."""

    def unit_rows(index: Tensor) -> Tensor:
        rows = features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))
        return F.normalize(rows.float(), dim=-1)

    similarity = torch.bmm(unit_rows(source), unit_rows(target).transpose(1, 2))  # (B, r, T)
    return target.gather(1, similarity.argmax(dim=-1))


MATCHINGS = {"cosine": cosine_match}

FEATURES: dict[str, Callable[[TokenState], Tensor]] = {
    "stream": lambda state: state.stream,
    "hidden": lambda state: state.hidden,
    "residual": lambda state: state.hidden if state.residual is None else state.residual,
}
"""What is compared, (B, L, C): the residual stream after the block, the block's output alone, the stream before it."""

MERGES: dict[str, Callable[[TokenState], Tensor]] = {
    "mean": lambda state: torch.ones_like(state.size),
    "size": lambda state: state.size,
}
"""With which weights tokens that become one are averaged, (B, L)."""

ORDERS: dict[str, Callable[[TokenState, Tensor], Tensor]] = {
    "index": lambda state, score: state.index,
}
"""What the survivors are sorted by, ascending, (B, L)."""
