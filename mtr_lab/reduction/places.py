"""The places where a policy acts besides after a mixer: the picture, the embedding, an MLP, the paths of a scan.

Each place has a table of named parts; the default is ``none`` (``all`` for paths). A part declares what it removes and
what its own steps cost, so that a schedule charges exactly that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mtr_lab.backbones import Backbone, blocks_of
from mtr_lab.ops import Plan
from mtr_lab.tokens import Evidence, Layout, ScanPath, TokenState


@dataclass(frozen=True)
class PicturePart:
    """Another picture of the same scene for the backbone, a smaller one for example."""

    size: Callable[[int, int], tuple[int, int]]
    """(height, width) of the picture -> (height, width) of the one for the backbone."""
    change: Callable[[Tensor], Tensor]
    """(B, channels, height, width) -> (B, channels, *size)."""


@dataclass(frozen=True)
class EmbeddingPart:
    """Fewer tokens before the first block."""

    removes: Callable[[Layout], int]
    """The number of tokens to remove from each sequence."""
    plan: Callable[[TokenState, int], Plan]
    """(state, number of tokens to remove) -> plan."""
    flops: Callable[[Layout, int], int]
    """(layout, channels) -> FLOPs of making the plan for one sequence; applying it is charged separately."""


@dataclass(frozen=True)
class MlpPart:
    """Fewer tokens in an MLP: it transforms the mean of merged tokens, and each of these tokens gets its output."""

    removes: Callable[[int, int], int]
    """(tokens, special ones among them) -> the number of tokens to merge away in each sequence."""
    plan: Callable[[TokenState, Evidence, int], Plan]
    """(state after the mixer, evidence, number of tokens to merge away) -> plan."""
    flops: Callable[[int, int], int]
    """(tokens, channels) -> FLOPs of making the plan for one sequence; applying it is charged separately."""
    needs: tuple[str, ...] = ()
    """The evidence that ``plan`` reads, names of ``mtr_lab.ops.STATS`` and ``"b"``, ``"c"``."""


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


PICTURES: dict[str, PicturePart | None] = {"none": None}
EMBEDDINGS: dict[str, EmbeddingPart | None] = {"none": None}
MLPS: dict[str, MlpPart | None] = {"none": None}


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


SCANS: dict[str, PathsPart | None] = {
    "all": None,
    "least": PathsPart(skips="least"),
    "last": PathsPart(skips="last"),
    "quarter": PathsPart(samples=True),
}
