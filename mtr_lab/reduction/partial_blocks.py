"""Blocks that compute a part of their work: fewer scan paths, one of each 2 x 2 tokens, or special tokens alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mtr_lab.backbones import Backbone, blocks_of
from mtr_lab.tokens import ScanPath


@dataclass(frozen=True)
class PathsPart:
    """Fewer paths in a scan."""

    choose: Callable[[Sequence[ScanPath]], Sequence[ScanPath]] = lambda paths: paths
    """The paths of a mixer -> those to scan, at least one."""
    skips: Literal["", "least", "last"] = ""
    """Whether a schedule skips paths of single blocks for a ratio, too: those whose absence changes the output of
    calibration images ``least`` first, or those of the ``last`` blocks; see ``mtr_lab.reduction.directions``."""
    samples: bool = False
    """Whether scans read one of each 2 x 2 tokens of the grid, see ``sampled_blocks``."""


SCANS: dict[str, PathsPart | None] = {
    "all": None,
    "least": PathsPart(skips="least"),
    "last": PathsPart(skips="last"),
    "quarter": PathsPart(samples=True),
}


def sampled_blocks(model: Backbone, part: PathsPart | None) -> tuple[bool, ...]:
    """For each block whether its scan reads one of each 2 x 2 tokens, as QuarterMap: not in the last stage."""
    stages, samples = model.stages, part is not None and part.samples
    return tuple(
        samples and stage is not stages[-1] and getattr(block.mixer, "samples_grid", False)
        for stage in stages
        for block in stage.blocks
    )


def blocks_alone(model: Backbone, share: float | None) -> tuple[bool, ...]:
    """For each block whether it computes the special tokens alone.

    The last block does, or this share of all blocks, if the head reads these tokens alone: blocks of the last stage
    without an MLP, whose mixer can do so. ``None``: no block does.
    """
    blocks = blocks_of(model)
    count = 0
    if share is not None and getattr(model, "reads_special_alone", False):
        count = min(max(1, int(share * len(blocks))), len(model.stages[-1].blocks))
    return tuple(
        number >= len(blocks) - count and block.mlp is None and getattr(block.mixer, "reads_tokens", False)
        for number, block in enumerate(blocks)
    )
