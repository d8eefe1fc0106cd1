"""Attention among tokens that stand for several."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula


def attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None) -> Tensor:
    """``softmax(q kᵀ / √d + log size) v``: attention among tokens, each of which counts ``size`` times as a key.

    It equals attention in which every key and value is repeated ``size`` times. PyTorch's fused kernels compute it.

    Args:
        q, k, v: (B, heads, L, d).
        size: (B, L), how many equal tokens each token stands for; ``None`` for 1.

    Returns:
        (B, heads, L, d).

    Source: proportional attention of Bolya et al., "Token Merging", arXiv 2210.09461.
    """
    bias = None if size is None else size.log().to(q.dtype)[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """2 for each multiply-accumulate of both products, as PyTorch counts its attention kernels of GPUs."""
    batch, heads, queries, depth = query
    return 2 * batch * heads * queries * key[2] * (depth + value[3])


_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
if _ON_CPU not in flop_registry:
    register_flop_formula(_ON_CPU)(_flops)
