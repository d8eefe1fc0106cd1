"""Skip scan directions of single blocks: ``mtr.paths=least`` and ``mtr.paths=last``.

Every (block, direction) pair is skipped once, alone, on unlabelled images. The pairs whose absence changes the output
least for what they save are skipped first, until they save their part of the ratio. A block keeps at least one
direction; what it keeps is not rescaled. DyVM (2025) learns to skip directions; skipping them without training has not
been published.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from math import floor

from torch import Tensor

from mtr_lab.backbones import Backbone, blocks_of
from mtr_lab.reduction.schedule import OutOfReach, Schedule
from mtr_lab.reduction.sensitivity import divergences

Pair = tuple[int, str]
"""The number of a block, and the name of one of its directions."""
Skipped = tuple[tuple[str, ...], ...]
"""The names of the skipped directions of every block."""


def last_first(model: Backbone) -> list[Pair]:
    """All pairs that can be skipped together, from the last block to the first: a baseline without images."""
    blocks = list(enumerate(blocks_of(model)))
    return [(number, path.name) for number, block in reversed(blocks) for path in reversed(block.mixer.paths[1:])]


def least_first(
    model: Backbone,
    use: Callable[[Schedule], None],
    cost: Callable[[Skipped], Schedule],
    unreduced: Schedule,
    images: Tensor,
) -> list[Pair]:
    """All pairs that can be skipped together, by rising KL divergence over the FLOPs saved.

    Args:
        model: a patched model.
        use: puts a schedule in force.
        cost: the schedule that removes no token and skips these directions.
        unreduced: the schedule that changes nothing.
        images: (B, channels, H, W), unlabelled, preprocessed and on the model's device.
    """
    blocks = blocks_of(model)
    pairs = [(number, path.name) for number, block in enumerate(blocks) for path in block.mixer.paths]
    pairs = [(number, name) for number, name in pairs if len(blocks[number].mixer.paths) > 1]
    schedules = [cost(skipped([pair], len(blocks))) for pair in pairs]
    prices = [
        kl / schedule.reduction
        for kl, schedule in zip(divergences(model, use, unreduced, schedules, images), schedules, strict=True)
    ]
    chosen, left = [], Counter({number: len(block.mixer.paths) for number, block in enumerate(blocks)})
    for _, pair in sorted(zip(prices, pairs, strict=True), key=lambda priced: priced[0]):
        if left[pair[0]] > 1:
            left[pair[0]] -= 1
            chosen.append(pair)
    return chosen


def skipped(pairs: Sequence[Pair], depth: int) -> Skipped:
    """The names of the directions of each of ``depth`` blocks."""
    return tuple(tuple(name for number, name in pairs if number == block) for block in range(depth))


def enough_pairs(pairs: Sequence[Pair], ratio: float, depth: int, cost: Callable[[Skipped], Schedule]) -> Skipped:
    """The first of the pairs, as few as save this share of the FLOPs.

    Raises:
        OutOfReach: all of them save less.
    """
    count = bisect_left(range(len(pairs) + 1), ratio, key=lambda n: cost(skipped(pairs[:n], depth)).reduction)
    if count > len(pairs):
        most = floor(cost(skipped(pairs, depth)).reduction * 1e4) / 1e4
        raise OutOfReach(
            f"skipped directions are to save {ratio:.4g} of the FLOPs, which is out of reach: with one direction a "
            f"block they save {most}. Lower mtr.ratio, or let tokens save the rest: mtr.paths_share={most / ratio:.2f} "
            "or less, and an mtr.schedule other than none."
        )
    return skipped(pairs[:count], depth)
