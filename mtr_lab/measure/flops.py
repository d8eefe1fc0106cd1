"""FLOPs of one image: computed from the model, in two conventions, or counted on a forward pass.

* literature: multiply-accumulates; one scan direction, as 9·L·E·N + 2·L·E; the convolution as 4·E·(L + 3); the patch
  embedding for all tokens, the class token, too.
* true: 2 for each multiply-accumulate of all matrix products and convolutions; 9·L·E·N + 2·L·E for each scan direction.
  ``torch.utils.flop_counter`` counts the same on a forward pass.

Both leave out normalisations and activations.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mtr_lab import ops
from mtr_lab.backbones import Backbone, as_backbone, blocks_of
from mtr_lab.backbones.costs import Costs
from mtr_lab.tokens import Layout, ScanPath

LITERATURE, TRUE = "literature", "true"


@dataclass(frozen=True)
class Work:
    """How much of a model is computed for one image of a given size.

    Args:
        remove: for each block the number of tokens removed from a sequence after the mixer; none by default.
        removed_at_embedding: the number of tokens removed before the first block.
        choose_paths: the paths of a mixer -> those to scan.
        skipped: for each block the names of paths that are not scanned; none by default.
        sampled: for each block whether its scan reads one of each 2 x 2 tokens; none does by default.
        grid: (layout of a stage, number of tokens) -> the layout that convolutions over the grid are computed on.
        repeated: whether the tokens of a reduced sequence are scanned as runs of equal ones.
        remaining: (tokens, number of them that a block removes) -> how many enter the next block: fewer, unless tokens
            merge for the MLP alone.
        alone: for each block whether it computes the tokens alone that the head reads; none does by default.
        merged_early: whether mixers that can do so merge tokens before their output projection.
    """

    remove: Sequence[int] | None = None
    removed_at_embedding: int = 0
    choose_paths: Callable[[Sequence[ScanPath]], Sequence[ScanPath]] = lambda paths: paths
    skipped: Sequence[Sequence[str]] = ()
    sampled: Sequence[bool] = ()
    grid: Callable[[Layout, int], Layout] = lambda layout, tokens: layout
    repeated: bool = False
    remaining: Callable[[int, int], int] = operator.sub
    alone: Sequence[bool] = ()
    merged_early: bool = False


ALL = Work()
"""The work of an unreduced model."""


def model_costs(model: Backbone, work: Work = ALL, img_size: Sequence[int] | None = None) -> tuple[Costs, list[int]]:
    """The costs of a classifier for one image, with its head, without the steps of a policy.

    Args:
        model: the classifier.
        work: how much of it is computed.
        img_size: (height, width), the model's own by default.

    Returns:
        The costs, and for each block the number of tokens of a sequence that enter it.
    """
    counts = iter(work.remove or [0] * len(blocks_of(model)))
    layouts, removed = remaining_layouts(model, work, img_size), work.removed_at_embedding
    total, entering = model.costs(layouts), []
    for stage, layout in zip(model.stages, layouts, strict=True):
        tokens, removed = layout.tokens - removed, 0
        for block in stage.blocks:
            entering.append(tokens)
            merged = next(counts)
            read = len(layout.special) if work.alone and work.alone[len(entering) - 1] else None
            transformed = 0 if block.mlp is None else entering[-1] - merged
            tokens = work.remaining(tokens, merged)
            grid = work.grid(layout, entering[-1])
            skipped = work.skipped[len(entering) - 1] if work.skipped else ()
            paths = [path for path in work.choose_paths(block.mixer.paths) if path.name not in skipped]
            is_sampled = bool(work.sampled) and work.sampled[len(entering) - 1]
            scanned = grid.sampled.patches if is_sampled else None
            projected = tokens if work.merged_early and hasattr(block.mixer, "merged_width") else None
            costs = block.costs(entering[-1], transformed, grid, paths, scanned=scanned, projected=projected, read=read)
            if work.repeated and entering[-1] < layout.tokens:
                costs = costs.repeating(len(paths))
            total += costs * layout.sequences
    return total, entering


def remaining_layouts(model: Backbone, work: Work = ALL, img_size: Sequence[int] | None = None) -> list[Layout]:
    """The tokens with which each stage starts; those of later ones are fewer if a stage before leaves a smaller grid.

    Arguments as of ``model_costs``.
    """
    layouts = model.layouts(img_size)
    follow = getattr(model, "layout_after", None)
    if follow is None or work.remove is None:
        return layouts
    counts, removed = iter(work.remove), work.removed_at_embedding
    for number, stage in enumerate(model.stages[:-1]):
        left = layouts[number].tokens - removed
        for _ in stage.blocks:
            left = work.remaining(left, next(counts))
        layouts[number + 1], removed = follow(number + 1, work.grid(layouts[number], left)), 0
    return layouts


def model_flops(model: Any, remove: Sequence[int] | None = None, convention: str = TRUE) -> int:
    """FLOPs of a classifier for one image of the model's input size.

    Args:
        model: the classifier, or an object of the authors' class.
        remove: for each block the number of tokens removed from a sequence after the mixer; none by default.
        convention: ``LITERATURE`` or ``TRUE``.
    """
    costs, _ = model_costs(as_backbone(model, "model_flops"), Work(remove))
    return costs.flops if convention == TRUE else costs.literature


def counted_flops(model: Any, images: Tensor) -> tuple[int, int]:
    """True FLOPs per image, counted by ``torch.utils.flop_counter`` on a forward pass.

    Returns:
        Those of the model, and those of the policy's own steps.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(images)
    counts = counter.get_flop_counts()
    total = sum(counts["Global"].values())
    reduction = sum(counts["Global"].get(op, 0) for op in ops.REDUCTION_OPS)
    return (total - reduction) // len(images), reduction // len(images)
