"""The patch embedding: images to tokens, with class token and positions, as one operation.

For inference in half precision on a GPU it is fused into one pass over memory.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.ops.linear import linear
from mtr_lab.ops.registry import Implementation, Operation, operator


def patch_tokens(
    images: Tensor, weight: Tensor, bias: Tensor | None, class_token: Tensor, positions: Tensor, place: int
) -> Tensor:
    """Project non-overlapping patches, insert the class token at ``place`` and add the positions. Differentiable.

    Args:
        images: (B, in_chans, H, W), P divides H and W.
        weight: (C, in_chans, P, P), of a convolution of stride P.
        bias: (C,), or ``None``.
        class_token: (1, 1, C).
        positions: (1, L, C), L = H · W / P² + 1, the entry of the class token at ``place``.
        place: the number of patches, in raster order, before the class token.

    Returns:
        (B, L, C). The fused kernel rounds once from float32, the reference after every step.
    """
    return PATCH_TOKENS(images, weight, bias, class_token, positions, place)


def patch_tokens_reference(
    images: Tensor, weight: Tensor, bias: Tensor | None, class_token: Tensor, positions: Tensor, place: int
) -> Tensor:
    """One step after the other in plain PyTorch. Arguments and result as ``patch_tokens``."""
    return add_class_token(project_patches(images, weight, bias), class_token, positions, place)


def project_patches(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Non-overlapping patches to tokens, (B, L - 1, C). Arguments as of ``patch_tokens``.

    Computed as a matrix product, which is faster than a convolution.
    """
    size = weight.shape[-1]
    rows, columns = images.shape[2] // size, images.shape[3] // size
    patches = images.reshape(*images.shape[:2], rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)
    return linear(patches.flatten(3).flatten(1, 2), weight.flatten(1), bias)


def add_class_token(patches: Tensor, class_token: Tensor, positions: Tensor, place: int) -> Tensor:
    """Projected patches (B, L - 1, C) to tokens (B, L, C). Other arguments as of ``patch_tokens``."""
    class_token = class_token.expand(patches.shape[0], -1, -1)
    return torch.cat([patches[:, :place], class_token, patches[:, place:]], dim=1) + positions


def _unfit(
    images: Tensor, weight: Tensor, bias: Tensor | None, class_token: Tensor, positions: Tensor, place: int
) -> str:
    if torch.is_grad_enabled():
        return "has no gradient of the fused patch embedding"
    # In float32 the library's matrix product is faster.
    if images.dtype == torch.float32 or bias is None or images.shape[1] != weight.shape[1]:
        return "fuses the patch embedding in half precision"
    same = all(t.dtype == images.dtype for t in (weight, bias, class_token, positions))
    return "" if same else "fuses the patch embedding in one dtype"


def _fused(*inputs: Any) -> Tensor:
    return _patch_tokens(*inputs)


PATCH_TOKENS = Operation(
    "patch_tokens",
    [
        Implementation("triton", _fused, unfit=_unfit, package="triton"),
        Implementation("reference", patch_tokens_reference),
    ],
)


def _run_kernel(*inputs: Any) -> Tensor:
    from mtr_lab.ops.gpu import embedding

    return embedding.patch_tokens(*inputs)


_patch_tokens = operator(
    "patch_tokens",
    "(Tensor images, Tensor weight, Tensor bias, Tensor class_token, Tensor positions, int place) -> Tensor",
    run=_run_kernel,
    fake=lambda images, weight, bias, class_token, positions, place: images.new_empty(
        images.shape[0], *positions.shape[1:]
    ),
    decomposition=patch_tokens_reference,
)


@register_flop_formula(torch.ops.mtr_lab.patch_tokens)
def patch_tokens_flops(images_shape, weight_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """2 FLOPs per value of the images and channel of the tokens."""
    return 2 * math.prod(images_shape) * weight_shape[0]
