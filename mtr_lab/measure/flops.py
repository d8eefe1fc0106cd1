"""FLOPs of one image, in the literature's convention and in truth, analytically and as counted on a forward pass.

Literature: multiply-accumulates; the scan as 9·L·E·N + 2·L·E; only one of the scan directions; 4·E·(L + 3) for
the convolution; the patch embedding charged for every token, the class token too. True: 2 per multiply-accumulate of
every matrix product and convolution, all directions, and the scan's count once a direction; it is what
``torch.utils.flop_counter`` sees of a forward pass. Normalisations and activations are left out of both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mtr_lab import ops
from mtr_lab.backbones import Backbone, blocks_of
from mtr_lab.backbones.costs import Costs
from mtr_lab.tokens import ScanPath

LITERATURE, TRUE = "literature", "true"


@dataclass(frozen=True)
class Work:
    """How much of a model is computed for one image, beside the size of the image.

    Args:
        remove: how many tokens of each sequence go after the mixer of each block; none by default.
        removed_at_embedding: how many go before the first block.
        merged_for_mlp: (tokens, special ones among them) -> how many are merged for an MLP alone.
        choose_paths: the paths of a mixer -> those it scans.
    """

    remove: Sequence[int] | None = None
    removed_at_embedding: int = 0
    merged_for_mlp: Callable[[int, int], int] = lambda tokens, special: 0
    choose_paths: Callable[[Sequence[ScanPath]], Sequence[ScanPath]] = lambda paths: paths


ALL = Work()
"""An unreduced model's."""


def model_costs(model: Backbone, work: Work = ALL, img_size: Sequence[int] | None = None) -> tuple[Costs, list[int]]:
    """What the whole classifier costs for one image, its head included, a reduction's own cost not.

    ``img_size`` is (height, width), the model's own by default.

    Returns:
        the costs, and how many tokens of a sequence enter each block.
    """
    counts = iter(work.remove or [0] * len(blocks_of(model)))
    layouts, gone = model.layouts(img_size), work.removed_at_embedding
    total, entering = model.costs(layouts), []
    for stage, layout in zip(model.stages, layouts, strict=True):
        tokens, gone = layout.tokens - gone, 0
        for block in stage.blocks:
            entering.append(tokens)
            tokens -= next(counts)
            transformed = tokens - work.merged_for_mlp(tokens, len(layout.special)) if block.mlp is not None else 0
            own = block.costs(entering[-1], transformed, layout, work.choose_paths(block.mixer.paths))
            total += own * layout.sequences
    return total, entering


def model_flops(model: Backbone, remove: Sequence[int] | None = None, convention: str = TRUE) -> int:
    """FLOPs of the classifier for one image of the model's input size, in the convention ``LITERATURE`` or ``TRUE``.

    ``remove`` is how many tokens of each sequence go after the mixer of each block; none by default.
    """
    costs, _ = model_costs(model, Work(remove))
    return costs.flops if convention == TRUE else costs.literature


def counted_flops(model: Any, images: Tensor) -> tuple[int, int]:
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
