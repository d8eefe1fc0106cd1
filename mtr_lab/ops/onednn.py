"""The matrix product of oneDNN, which PyTorch contains."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def has_onednn() -> bool:
    """Whether this PyTorch has the product of oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this type on this CPU: bfloat16 needs AVX-512 on x86."""
    if dtype == torch.bfloat16:
        return has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return has_onednn() and dtype == torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` on the CPU without gradients, by oneDNN where it has the product.

    For float32 PyTorch calls MKL, which uses half of the vector width of some of AMD's processors.
    """
    if not (_multiplies(x.dtype) and torch.backends.mkldnn.enabled and x.numel()):
        return F.linear(x, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
