"""The norms before mixers and MLPs: they apply a pending plan, add the two streams and normalise the sum."""

import torch
from torch import Tensor, nn

from mtr_lab import ops


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the sum of the hidden and the residual stream."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(
        self, hidden: Tensor, residual: Tensor | None = None, plan: ops.Plan | None = None
    ) -> tuple[Tensor, Tensor]:
        """Two streams (B, L, C) -> normed and residual, (B, M, C), as ``mtr_lab.ops.rms_norm_add``."""
        return ops.rms_norm_add(hidden, residual, self.weight, self.eps, plan=plan)


class LayerNorm(nn.Module):
    """Layer normalisation of the sum of the hidden and the residual stream."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(
        self, hidden: Tensor, residual: Tensor | None = None, plan: ops.Plan | None = None
    ) -> tuple[Tensor, Tensor]:
        """Two streams (B, L, C) -> normed and residual, (B, M, C), as ``mtr_lab.ops.layer_norm_add``."""
        return ops.layer_norm_add(hidden, residual, self.weight, self.bias, self.eps, plan=plan)


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation of the channels of maps (B, C, rows, columns)."""

    def forward(self, maps: Tensor) -> Tensor:
        rows = maps.permute(0, 2, 3, 1)
        if self.weight is None:
            return super().forward(rows).permute(0, 3, 1, 2)
        normed = ops.layer_norm(rows.flatten(1, 2), self.weight, self.bias, self.eps)
        return normed.unflatten(1, rows.shape[1:3]).permute(0, 3, 1, 2)
