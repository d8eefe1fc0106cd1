"""Residual addition and RMS normalisation, the step between two blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_add(hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Add ``hidden`` to the residual stream and normalise the sum.

    Args:
        hidden: (B, L, C), the previous block's output.
        residual: (B, L, C) in float32 (or float64), or ``None`` before the first block.
        weight: (C,).

    Returns:
        normed: (B, L, C) in the dtype of ``hidden``.
        residual: (B, L, C), the sum, kept in float32 whatever the model's dtype (float64 for float64).
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    residual = hidden.to(wide) if residual is None else hidden.to(wide) + residual
    return F.rms_norm(residual, weight.shape, weight.to(wide), eps).to(hidden.dtype), residual
