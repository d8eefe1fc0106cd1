"""A head that reads standardised features while it is trained, and is a linear layer afterwards."""

from typing import Any

from torch import Tensor, nn


class StandardisedHead(nn.Module):
    """Features (B, C) to logits (B, K): each feature is standardised over the batch, then a linear layer follows.

    The mean over the tokens of a video hardly differs between videos: in an untrained model of 129 tokens its standard
    deviation is a fourteenth of its size, and a linear layer alone learns almost nothing from it. The linear layer
    starts anew: trained weights are those for features that are not standardised.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(head.in_features, affine=False, device=head.weight.device)
        self.linear = head
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.norm(features))
        return logits

    def folded(self) -> nn.Linear:
        """The linear layer that computes the same by the running mean and variance; it changes ``linear``."""
        statistics: Any = self.norm
        self.linear.weight.data /= (statistics.running_var + statistics.eps).sqrt()
        self.linear.bias.data -= self.linear.weight.data @ statistics.running_mean
        return self.linear
