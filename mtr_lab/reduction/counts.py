"""How many tokens one reduction step can remove, and its FLOPs, from the settings alone."""

from functools import cache

from mtr_lab.reduction.group import GROUPINGS
from mtr_lab.reduction.match import MATCHINGS
from mtr_lab.reduction.settings import Settings


def candidates(settings: Settings, length: int, special: int, remove: int) -> tuple[int, int, int]:
    """The numbers of tokens pruned first, of candidate sources, and of targets, in a step that removes ``remove``.

    Args:
        length: of the sequence.
        special: how many of its tokens are special.
    """
    first = round(settings.prune_first * remove)
    pool = max(0, free(settings, length, special) - first)
    return first, *GROUPINGS[settings.grouping].sizes(pool, remove - first, settings.target_fraction)


def free(settings: Settings, length: int, special: int) -> int:
    """The number of tokens that may go or absorb others."""
    return length - special * (1 + settings.zone)


@cache
def capacity(settings: Settings, length: int, special: int) -> int:
    """The most tokens that one step can remove from ``length`` tokens, ``special`` special ones among them."""
    for remove in range(free(settings, length, special) - 1, 0, -1):
        if fits(settings, length, special, remove):
            return remove
    return 0


def fits(settings: Settings, length: int, special: int, remove: int) -> bool:
    """Whether one step can remove ``remove`` tokens, at least one."""
    if not 0 < remove < free(settings, length, special):
        return False
    first, sources, targets = candidates(settings, length, special, remove)
    return sources >= remove - first and targets >= 1


def flops(settings: Settings, length: int, special: int, remove: int, channels: int, axes: int) -> int:
    """True FLOPs of a step on one sequence: of similarities, and of applying the plan to two streams.

    Args:
        axes: of the grid that the tokens stood on, for matching among neighbours.
    """
    if remove == 0:
        return 0
    first, sources, targets = candidates(settings, length, special, remove)
    compared = settings.merging.compares(sources, remove - first)
    pairs = MATCHINGS[settings.matching].comparisons(sources, targets, axes) if compared else 0
    return 2 * pairs * channels + 2 * 2 * remove * channels
