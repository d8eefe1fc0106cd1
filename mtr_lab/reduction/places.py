"""Where else a policy acts than after a mixer: on the picture, at the embedding, round an MLP, on the paths of a scan.

Each place has a table of named parts, ``none`` (or ``all`` paths) by default. A part says what it does and what is
left to compute, so that a schedule charges exactly that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from mtr_lab.ops import Plan
from mtr_lab.tokens import Evidence, Layout, ScanPath, TokenState


@dataclass(frozen=True)
class PicturePart:
    """Another picture for the backbone, of the same scene."""

    size: Callable[[int, int], tuple[int, int]]
    """(height, width) of the picture -> of the one that the backbone is given."""
    change: Callable[[Tensor], Tensor]
    """(B, channels, height, width) -> (B, channels, *size)."""


@dataclass(frozen=True)
class EmbeddingPart:
    """Fewer tokens before the first block."""

    removes: Callable[[Layout], int]
    """How many tokens of a sequence go."""
    plan: Callable[[TokenState, int], Plan]
    """The plan that removes that many."""
    flops: Callable[[Layout, int], int]
    """(layout, channels) -> FLOPs of deciding, for one sequence; moving tokens is charged separately."""


@dataclass(frozen=True)
class MlpPart:
    """Fewer tokens in an MLP: it runs on the mean of those that are merged, and all of them get its output."""

    removes: Callable[[int, int], int]
    """(tokens, special ones among them) -> how many of a sequence go."""
    plan: Callable[[TokenState, Evidence, int], Plan]
    """The plan that removes that many, from the state after the mixer."""
    flops: Callable[[int, int], int]
    """(tokens, channels) -> FLOPs of deciding, for one sequence; moving tokens is charged separately."""
    needs: tuple[str, ...] = ()
    """The evidence it reads, names of ``mtr_lab.ops.STATS`` and ``"b"``, ``"c"``."""


@dataclass(frozen=True)
class PathsPart:
    """Fewer paths in a scan."""

    choose: Callable[[Sequence[ScanPath]], Sequence[ScanPath]]
    """The paths of a mixer -> those it scans, at least one."""


PICTURES: dict[str, PicturePart | None] = {"none": None}
EMBEDDINGS: dict[str, EmbeddingPart | None] = {"none": None}
MLPS: dict[str, MlpPart | None] = {"none": None}
SCANS: dict[str, PathsPart | None] = {"all": None}
