"""Images to the tokens before the first block, as one operation: for inference on a GPU.

It computes what the patch embedding, the concatenation with the class token and the addition of the positions compute
one after the other, with one pass over memory.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtr_lab.ops.mamba_inner import fuses


def makes_tokens(images: Tensor, weight: Tensor, *others: Tensor) -> bool:
    """Whether ``patch_tokens`` runs on these: half precision throughout, on a GPU, where no gradient can be asked for.

    The product of the library is faster in float32.
    """
    return (
        images.dtype in (torch.float16, torch.bfloat16)
        and all(t.dtype == images.dtype for t in (weight, *others))
        and images.shape[1] == weight.shape[1]
        and fuses(images)
    )


def patch_tokens(
    images: Tensor, weight: Tensor, bias: Tensor, class_token: Tensor, positions: Tensor, place: int
) -> Tensor:
    """Project patches that do not overlap, put the class token at ``place`` and add the positions.

    Args:
        images: (B, in_chans, H, W), P divides H and W; read in place if the last stride is 1.
        weight: (C, in_chans, P, P), of a convolution of stride P; ``bias`` (C,).
        class_token: (1, 1, C).
        positions: (1, L, C), L = H · W / P² + 1, the class token's entry at ``place``.
        place: how many patches, row by row, come before the class token.

    All in the same dtype, float16 or bfloat16.

    Returns:
        (B, L, C) in that dtype, rounded once from float32.
    """
    return _patch_tokens(images, weight, bias, class_token, positions, place)


def patch_tokens_reference(
    images: Tensor, weight: Tensor, bias: Tensor, class_token: Tensor, positions: Tensor, place: int
) -> Tensor:
    """The contract of ``patch_tokens``, plain and differentiable, in any dtype; every step is rounded."""
    patches = F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    return add_class_token(patches, class_token, positions, place)


def add_class_token(patches: Tensor, class_token: Tensor, positions: Tensor, place: int) -> Tensor:
    """Projected patches (B, L - 1, C) to tokens (B, L, C), the other arguments as for ``patch_tokens``."""
    class_token = class_token.expand(patches.shape[0], -1, -1)
    return torch.cat([patches[:, :place], class_token, patches[:, place:]], dim=1) + positions


@torch.library.custom_op("mtr_lab::patch_tokens", mutates_args=())
def _patch_tokens(
    images: Tensor, weight: Tensor, bias: Tensor, class_token: Tensor, positions: Tensor, place: int
) -> Tensor:
    from mtr_lab.ops.gpu import patch_tokens

    return patch_tokens.patch_tokens(images, weight, bias, class_token, positions, place)


@_patch_tokens.register_fake
def _(images, weight, bias, class_token, positions, place):  # type: ignore[no-untyped-def]
    return images.new_empty(images.shape[0], *positions.shape[1:])


@register_flop_formula(torch.ops.mtr_lab.patch_tokens)
def patch_tokens_flops(images_shape, weight_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """2 a multiply-accumulate: every pixel is in one patch, once for every channel of the tokens."""
    return 2 * math.prod(images_shape) * weight_shape[0]
