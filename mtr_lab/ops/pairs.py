"""The similarity of given pairs of tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.ops.registry import Implementation, Operation


def pair_similarity(features: Tensor, first: Tensor, second: Tensor, cosine: bool) -> Tensor:
    """The similarity of tokens ``first[b, p]`` and ``second[b, p]``. It has no gradient.

    Args:
        features: (B, L, C).
        first, second: positions (B, P) each.
        cosine: the cosine; else the negative L1 distance.

    Returns:
        (B, P) float32.
    """
    return PAIR_SIMILARITY(features.detach(), first, second, cosine)


def pair_similarity_reference(features: Tensor, first: Tensor, second: Tensor, cosine: bool) -> Tensor:
    """Plain PyTorch. Arguments and result as ``pair_similarity``."""

    def rows(index: Tensor) -> Tensor:
        return features.gather(1, index[..., None].expand(-1, -1, features.shape[-1])).float()

    if cosine:
        return F.cosine_similarity(rows(first), rows(second), dim=-1)
    return -(rows(first) - rows(second)).abs().sum(-1)


PAIR_SIMILARITY = Operation(
    "pair_similarity",
    [Implementation("reference", pair_similarity_reference)],
    schema=("Tensor features, Tensor first, Tensor second, bool cosine", "Tensor"),
    fake=lambda features, first, second, cosine: features.new_empty(first.shape, dtype=torch.float32),
)


@register_flop_formula(torch.ops.mtr_lab.pair_similarity)
def pair_similarity_flops(features_shape, first_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """2 FLOPs per channel and pair."""
    return 2 * first_shape[0] * first_shape[1] * features_shape[2]
