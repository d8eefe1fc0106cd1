"""The settings of a policy: their names, what they may be, and which go together."""

from dataclasses import dataclass
from typing import Any

from mtr_lab import ops
from mtr_lab.errors import UserError, check_number, unknown
from mtr_lab.reduction import cells
from mtr_lab.reduction.group import GROUPINGS
from mtr_lab.reduction.lines import GRID, LINES
from mtr_lab.reduction.match import FEATURES, MATCHINGS
from mtr_lab.reduction.merge import MERGES, Merge
from mtr_lab.reduction.order import ORDERS
from mtr_lab.reduction.partial_blocks import SCANS
from mtr_lab.reduction.scope import CLIP, FRAME, SCOPES
from mtr_lab.reduction.score import SCORES, Score
from mtr_lab.reduction.select import SELECTIONS
from mtr_lab.tokens import PATHS

EVIDENCE = (*ops.STATS, "b", "c")
BOTH = "both"
SURVIVORS, UNMERGED = "survivors", "unmerged"
EXACT = "exact"
NO_INPUT = "none"
BLOCK, SCAN, MLP = "block", "scan", "mlp"
WHOLE, READ = "whole", "read"


@dataclass(frozen=True)
class Settings:
    """Score → group → match → merge → order, each step a named part. The defaults are files in conf/reduction.

    Args:
        policy: the policy's name.
        score: the importance of a token, a name of ``score.SCORES``; a minus in front negates it.
        directions: the scan directions whose evidence is read: ``both`` for all, or one by name (``forward``, …).
        grouping: a name of ``group.GROUPINGS``, or ``lines``, see the module ``lines``.
        target_fraction: targets as a share of the tokens that are not sources (``asymmetric``).
        matching: a name of ``match.MATCHINGS``.
        features: the vectors that matching compares, a name of ``match.FEATURES``.
        merge: what happens to removed tokens, a name of ``merge.MERGES``.
        prune_first: share of the removed tokens that is pruned by score before grouping (PuMer).
        prune_share: share of the merged tokens, the most similar ones, that is pruned from the block's output and
            merged in the residual stream alone (UTR).
        order: of the survivors in the sequence, a name of ``order.ORDERS``, or ``grid`` for ``lines``. Paths over the
            grid follow the grid anyway.
        align: from the next block on, the scan's state decays over pruned tokens (HSA).
        stretch: from the next block on, Δ of a merged token is multiplied by its size to this power, since it stands
            for several time steps; or ``exact``: the token is scanned as a run of as many equal tokens as its size.
        convolution: from the first reduction on, the causal convolution of a mixer runs over the ``survivors``, or
            ``unmerged`` over all original positions, at each of which stands the token that has absorbed it. A pruned
            token leaves the sequence either way. A convolution over the grid always runs over all original positions.
        merge_at: tokens merge after the ``block``, or after its ``scan`` and gate, before the output projection, which
            then runs on the survivors alone. For the same decision the result is the same, but the decision cannot read
            the output of the block. Or they merge for the ``mlp`` of the block alone, and all of them get its output:
            mixers and the residual stream keep the whole sequence.
        last_block: the last block computes the ``whole`` sequence, or what is ``read``: if the head reads class tokens
            alone, their output alone, to the same values.
        read_share: the share of all blocks, the last ones, that ``read`` does this in. Before the last block it is an
            approximation: the streams of other tokens stay as they are, and no tokens are removed there.
        seed: of a score that draws random numbers; other scores ignore it.
        paths: the scan directions that remain, a name of ``partial_blocks.SCANS``.
        input: tokens of two sizes before the first block: what chooses the cells of patches that become one token each,
            a name of ``cells.CRITERIA``, or ``none``.
        input_share: share of the patches' tokens that this removes.
        input_cell, input_token, input_place: the shape of a cell, its token and the place of this token in the
            sequence, names of ``cells.SHAPES``, ``TOKENS`` and ``PLACES``.
        zone: the number of tokens nearest in the sequence to each class token that neither go nor absorb others.
        window: the pairs of a window (``lines``).
        paths_share: the share of the ratio that skipped scan paths save (``least``, ``last``).
        selection: which candidate sources go, where a grouping has more than needed; a name of ``select.SELECTIONS``.
        scope: of a video, whether the tokens of all frames or those of each frame compete, one of ``scope.SCOPES``.

    Raises:
        UserError: the name of a part is unknown, or a number is out of its range.
    """

    policy: str
    score: str
    directions: str
    grouping: str
    target_fraction: float
    matching: str
    features: str
    merge: str
    prune_first: float
    prune_share: float
    order: str
    align: bool
    stretch: float | str
    seed: int = 0  # configurations in older results lack this key and those that follow
    paths: str = "all"
    convolution: str = SURVIVORS
    zone: int = 0
    window: int = 5
    paths_share: float = 1.0
    input: str = NO_INPUT
    input_share: float = 0.25
    input_cell: str = "2x2"
    input_token: str = cells.MEAN
    input_place: str = cells.FIRST
    merge_at: str = BLOCK
    last_block: str = WHOLE
    read_share: float = 0.0
    selection: str = "similarity"
    scope: str = CLIP

    def __post_init__(self) -> None:
        self._check_names()
        self._check_numbers()
        self._check_parts()
        self._check_full_grid()

    def _check_names(self) -> None:
        tables: dict[str, Any] = {
            "directions": (BOTH, *PATHS),
            "grouping": (*GROUPINGS, LINES),
            "matching": MATCHINGS,
            "features": FEATURES,
            "selection": SELECTIONS,
            "merge": MERGES,
            "order": (*ORDERS, GRID),
            "paths": SCANS,
            "convolution": (SURVIVORS, UNMERGED),
            "input": (NO_INPUT, *cells.CRITERIA),
            "input_cell": cells.SHAPES,
            "input_token": cells.TOKENS,
            "input_place": cells.PLACES,
            "merge_at": (BLOCK, SCAN, MLP),
            "last_block": (WHOLE, READ),
            "scope": SCOPES,
        }
        if str(self.score).removeprefix("-") not in SCORES:
            raise unknown("mtr.score", str(self.score), SCORES)
        for name in self.needs:
            if name not in EVIDENCE:
                raise unknown(f"evidence that mtr.score={self.score} reads", name, EVIDENCE)
        for part, table in tables.items():
            if getattr(self, part) not in table:
                raise unknown(f"mtr.{part}", str(getattr(self, part)), table)

    def _check_numbers(self) -> None:
        for share in ("target_fraction", "prune_first", "prune_share", "stretch"):
            value, named = getattr(self, share), EXACT if share == "stretch" else None
            if value != named and (
                isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1
            ):
                raise UserError(f"mtr.{share} must be in [0, 1]{f' or {named}' if named else ''}, got {value!r}.")
        check_number("mtr.seed", self.seed, int, 0, 2**32 - 1)
        check_number("mtr.zone", self.zone, int, 0)
        check_number("mtr.window", self.window, int, 1)
        check_number("mtr.read_share", self.read_share, float, 0, 1)
        check_number("mtr.paths_share", self.paths_share, float, 0, 1)
        check_number("mtr.input_share", self.input_share, float, 0, 1)

    def _check_parts(self) -> None:
        """Which parts of a decision go together."""
        if self.align and self.order != "index":
            raise UserError(
                f"mtr.align counts the tokens missing between neighbours, and mtr.order={self.order} changes the "
                "neighbours: set mtr.order=index, or mtr.align=false."
            )
        for part, rule in (("merge", self.merging), ("matching", MATCHINGS[self.matching])):
            if self.grouping not in (rule.groupings or (*GROUPINGS, LINES)):
                given, needed = getattr(self, part), " or ".join(rule.groupings)
                raise UserError(
                    f"mtr.{part}={given} with mtr.grouping={self.grouping}: it needs mtr.grouping={needed}."
                )
        for part in ("score", "features"):
            if self.merges_early and self._reads_output(part):
                raise UserError(
                    f"mtr.merge_at={SCAN} with mtr.{part}={getattr(self, part)}, which reads the output of the block, "
                    f"and this is computed after merging: set mtr.merge_at={BLOCK}, or "
                    + ("mtr.features=residual." if part == "features" else "choose another score.")
                )

    def _check_full_grid(self) -> None:
        """Which parts leave a full grid, and which need one."""
        if self.keeps_grid != (self.order == GRID):
            raise UserError(
                f"mtr.grouping={self.grouping} with mtr.order={self.order}: mtr.grouping={LINES} keeps a full grid, "
                f"whose order is mtr.order={GRID}; set both or none."
            )
        for part in ("prune_first", "prune_share", "zone"):
            if self.keeps_grid and getattr(self, part):
                raise UserError(f"mtr.{part}={getattr(self, part)} with mtr.grouping={LINES}: expected 0.")
        if self.keeps_grid and self.scope == FRAME:
            raise UserError(
                f"mtr.scope={FRAME} with mtr.grouping={LINES}, which removes the same rows and columns of all frames: "
                f"set mtr.scope={CLIP}."
            )
        scan = SCANS[self.paths]
        if self.cells is not None and (self.keeps_grid or (scan is not None and scan.samples)):
            whole = f"mtr.grouping={LINES}" if self.keeps_grid else f"mtr.paths={self.paths}"
            raise UserError(f"mtr.input={self.input} with {whole}, which needs a full grid: set mtr.input={NO_INPUT}.")

    @property
    def keeps_grid(self) -> bool:
        """Whether a full grid remains, so that removals come in whole rows and columns."""
        return self.grouping == LINES

    @property
    def ranks(self) -> bool:
        """Whether tokens are chosen by importance, not by similarity alone."""
        if self.keeps_grid:
            return self.merging.into == "nothing"
        return bool(self.prune_first) or GROUPINGS[self.grouping].ranked or self.selection == "score"

    @property
    def scoring(self) -> Score:
        """The score's function and what it reads."""
        return SCORES[self.score.removeprefix("-")]

    @property
    def needs(self) -> tuple[str, ...]:
        """The evidence to collect."""
        return self.scoring.needs

    @property
    def merging(self) -> Merge:
        """The merge rule."""
        return MERGES[self.merge]

    @property
    def cells(self) -> cells.Cells | None:
        """The tokens of two sizes before the first block; ``None`` for one size."""
        if self.input == NO_INPUT:
            return None
        return cells.Cells(self.input, self.input_cell, self.input_token, self.input_place, self.input_share, self.seed)

    @property
    def draws(self) -> bool:
        """Whether the result depends on ``seed``."""
        return self.scoring.draws or self.input == "random"

    @property
    def size_exponent(self) -> float:
        """Δ of a merged token is multiplied by its size to this power."""
        return 0.0 if isinstance(self.stretch, str) else self.stretch

    @property
    def prunes(self) -> bool:
        """Whether some removed tokens are dropped, not merged."""
        return self.merging.into == "nothing" or self.prune_first > 0 or self.prune_share > 0

    @property
    def unmerges(self) -> bool:
        """Whether convolutions run over the original positions, and these differ from the survivors'."""
        return self.convolution == UNMERGED and (self.merging.into != "nothing" or self.cells is not None)

    @property
    def merges_early(self) -> bool:
        """Whether tokens merge before the output projection of a mixer."""
        return self.merge_at == SCAN

    @property
    def merges_in_mlp(self) -> bool:
        """Whether tokens merge for the MLP of a block alone, so that all of them remain."""
        return self.merge_at == MLP

    @property
    def share_alone(self) -> float | None:
        """The share of the blocks, at least the last one, that compute special tokens alone; ``None``: none does."""
        return self.read_share if self.last_block == READ else None

    @property
    def acts_at_other_places(self) -> bool:
        """Whether the policy acts at other places than after mixers."""
        return self.cells is not None or self.last_block == READ or SCANS[self.paths] is not None

    def _reads_output(self, part: str) -> bool:
        """Whether a decision reads the output of the block by its ``score`` or its ``features``."""
        if part == "score":
            return self.scoring.reads_output
        compares = self.merging.into == "nearest" or (not self.keeps_grid and self.grouping != "asymmetric")
        return compares and self.features != "residual"
