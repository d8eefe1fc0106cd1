"""Stochastic depth.

Source: Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382.
"""

from torch import Tensor, nn


class DropPath(nn.Module):
    """While training, zero the features of an image with probability ``drop_prob`` and scale the others up."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, features: Tensor) -> Tensor:
        """(B, \\*) -> (B, \\*); the identity in evaluation."""
        if not self.training or self.drop_prob == 0:
            return features
        mask = features.new_empty(len(features), *[1] * (features.ndim - 1)).bernoulli_(1 - self.drop_prob)
        return features * mask.div_(1 - self.drop_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """The drop probability of each block, as in Vim and VideoMamba: 0, then linearly from 0 to just under ``rate``."""
    return [rate * max(block - 1, 0) / max(depth - 1, 1) for block in range(depth)]
