"""FLOPs of one image, in the literature's convention and in truth, analytically and as counted on a forward pass.

Literature: multiply-accumulates; the scan as 9·L·E·N + 2·L·E; only one of the two scan directions; 4·E·(L + 3) for
the convolution; the patch embedding charged for every token, the class token too. True: 2 per multiply-accumulate of
every matrix product and convolution, both directions, and the scan's count once a direction; it is what
``torch.utils.flop_counter`` sees of a forward pass. Normalisations and activations are left out of both.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mtr_lab import ops
from mtr_lab.backbones import VisionMamba
from mtr_lab.backbones.bimamba import BiMamba

LITERATURE, TRUE = "literature", "true"


def block_flops(mixer: BiMamba, tokens: int, convention: str = TRUE) -> int:
    """FLOPs of one block on one image of that many tokens."""
    width, inner, rank, states = mixer.d_model, mixer.d_inner, mixer.dt_rank, mixer.d_state
    padding = mixer.d_conv - 1 if convention == LITERATURE else 0
    projections = 3 * width * inner * tokens  # in_proj and out_proj
    direction = (
        mixer.d_conv * inner * (tokens + padding)
        + tokens * inner * (rank + 2 * states)  # x_proj
        + tokens * rank * inner  # dt_proj
    )
    scan = 9 * tokens * inner * states + 2 * tokens * inner
    if convention == LITERATURE:
        return projections + direction + scan
    directions = len(mixer.reverse)
    return 2 * (projections + directions * direction) + directions * scan


def model_flops(model: VisionMamba, tokens: Sequence[int] | None = None, convention: str = TRUE) -> int:
    """FLOPs of the whole classifier on one image, class head included, a reduction's own cost not.

    Args:
        tokens: how many tokens enter each block; by default those of an unreduced image of the model's own size.
        convention: ``LITERATURE`` or ``TRUE``.
    """
    tokens = tokens or [num_tokens(model)] * len(model.blocks)
    embedding = model.patch_embed.proj.weight.numel()
    head = model.num_features * model.num_classes
    blocks = sum(block_flops(block.mixer, n, convention) for block, n in zip(model.blocks, tokens, strict=True))
    if convention == LITERATURE:
        return blocks + tokens[0] * embedding + head
    return blocks + 2 * ((tokens[0] - 1) * embedding + head)


def num_tokens(model: VisionMamba, img_size: tuple[int, int] | None = None) -> int:
    """Tokens of one unreduced image or video, class token included; of the model's own size unless another is given."""
    rows, columns = model.patch_embed.grid(*img_size) if img_size else model.patch_embed.grid_size
    return model.patch_embed.frames * rows * columns + 1


def counted_flops(model: VisionMamba, images: Tensor) -> tuple[int, int]:
    """True FLOPs per image as ``torch.utils.flop_counter`` counts them on a real forward pass.

    Returns:
        of the model without the reduction, and of the reduction's own steps.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(images)
    counts = counter.get_flop_counts()
    total = sum(counts["Global"].values())
    reduction = sum(counts["Global"].get(op, 0) for op in ops.REDUCTION_OPS)
    return (total - reduction) // len(images), reduction // len(images)
