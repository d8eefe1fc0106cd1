"""The matrix product of oneDNN, which PyTorch contains."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def has_onednn() -> bool:
    """Whether this PyTorch has the product of oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` for float32 on the CPU without gradients, by oneDNN.

    PyTorch calls MKL, which uses half of the vector width of AMD's processors.
    """
    if not (has_onednn() and torch.backends.mkldnn.enabled and x.numel()):
        return F.linear(x, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
