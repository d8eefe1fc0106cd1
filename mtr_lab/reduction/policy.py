"""A policy decides which tokens of a sequence are removed, and which survivors absorb them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtr_lab import ops
from mtr_lab.backbones import Backbone, blocks_of
from mtr_lab.errors import UserError, check_number, unknown
from mtr_lab.policy_files import find_policy, policy_files, read_policy
from mtr_lab.reduction import cells, lines, merge
from mtr_lab.reduction.group import GROUPINGS, ascending
from mtr_lab.reduction.lines import GRID, LINES
from mtr_lab.reduction.match import FEATURES, MATCHINGS, grid_axes
from mtr_lab.reduction.merge import MERGES, Merge
from mtr_lab.reduction.order import ORDERS
from mtr_lab.reduction.places import EMBEDDINGS, MLPS, PICTURES, SCANS, sampled_blocks
from mtr_lab.reduction.plan import Plan, make_plan
from mtr_lab.reduction.score import SCORES, Score
from mtr_lab.reduction.select import SELECTIONS
from mtr_lab.tokens import PATHS, Evidence, Layout, TokenState
from mtr_lab.tokens.pooling import tokens_outside

EVIDENCE = (*ops.STATS, "b", "c")
BOTH = "both"
SURVIVORS, UNMERGED = "survivors", "unmerged"
EXACT = "exact"
NO_INPUT = "none"
BLOCK, SCAN, MLP = "block", "scan", "mlp"
WHOLE, READ = "whole", "read"


@dataclass(frozen=True)
class Policy:
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
        picture, embedding, mlp, paths: what the policy does at other places, names of ``places.PICTURES``,
            ``EMBEDDINGS``, ``MLPS`` and ``SCANS``.
        input: tokens of two sizes before the first block: what chooses the cells of patches that become one token each,
            a name of ``cells.CRITERIA``, or ``none``.
        input_share: share of the patches' tokens that this removes.
        input_cell, input_token, input_place: the shape of a cell, its token and the place of this token in the
            sequence, names of ``cells.SHAPES``, ``TOKENS`` and ``PLACES``.
        zone: the number of tokens nearest in the sequence to each class token that neither go nor absorb others.
        window: the pairs of a window (``lines``).
        paths_share: the share of the ratio that skipped scan paths save (``least``, ``last``).
        selection: which candidate sources go, where a grouping has more than needed; a name of ``select.SELECTIONS``.

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
    picture: str = "none"
    embedding: str = "none"
    mlp: str = "none"
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

    def __post_init__(self) -> None:
        tables: dict[str, Any] = {
            "directions": (BOTH, *PATHS),
            "grouping": (*GROUPINGS, LINES),
            "matching": MATCHINGS,
            "features": FEATURES,
            "selection": SELECTIONS,
            "merge": MERGES,
            "order": (*ORDERS, GRID),
            "picture": PICTURES,
            "embedding": EMBEDDINGS,
            "mlp": MLPS,
            "paths": SCANS,
            "convolution": (SURVIVORS, UNMERGED),
            "input": (NO_INPUT, *cells.CRITERIA),
            "input_cell": cells.SHAPES,
            "input_token": cells.TOKENS,
            "input_place": cells.PLACES,
            "merge_at": (BLOCK, SCAN, MLP),
            "last_block": (WHOLE, READ),
        }
        if str(self.score).removeprefix("-") not in SCORES:
            raise unknown("mtr.score", str(self.score), SCORES)
        for name in self.needs:
            if name not in EVIDENCE:
                raise unknown(f"evidence that mtr.score={self.score} reads", name, EVIDENCE)
        for part, table in tables.items():
            if getattr(self, part) not in table:
                raise unknown(f"mtr.{part}", str(getattr(self, part)), table)
        if self.align and self.order != "index":
            raise UserError(
                f"mtr.align counts the tokens missing between neighbours, and mtr.order={self.order} changes the "
                "neighbours: set mtr.order=index, or mtr.align=false."
            )
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
        for part, rule in (("merge", self.merging), ("matching", MATCHINGS[self.matching])):
            if self.grouping not in (rule.groupings or (*GROUPINGS, LINES)):
                given, needed = getattr(self, part), " or ".join(rule.groupings)
                raise UserError(
                    f"mtr.{part}={given} with mtr.grouping={self.grouping}: it needs mtr.grouping={needed}."
                )

        if self.keeps_grid != (self.order == GRID):
            raise UserError(
                f"mtr.grouping={self.grouping} with mtr.order={self.order}: mtr.grouping={LINES} keeps a full grid, "
                f"whose order is mtr.order={GRID}; set both or none."
            )
        for part in ("prune_first", "prune_share", "zone"):
            if self.keeps_grid and getattr(self, part):
                raise UserError(f"mtr.{part}={getattr(self, part)} with mtr.grouping={LINES}: expected 0.")
        for part in ("score", "features"):
            if self.merges_early and self._reads_output(part):
                raise UserError(
                    f"mtr.merge_at={SCAN} with mtr.{part}={getattr(self, part)}, which reads the output of the block, "
                    f"and this is computed after merging: set mtr.merge_at={BLOCK}, or "
                    + ("mtr.features=residual." if part == "features" else "choose another score.")
                )
        if self.merges_in_mlp and MLPS[self.mlp] is not None:
            raise UserError(f"mtr.merge_at={MLP} and mtr.mlp={self.mlp} merge both for the MLP: set mtr.mlp=none.")
        scan = SCANS[self.paths]
        needs_grid = self.keeps_grid or (scan is not None and scan.samples)
        for part, acts in (("embedding", EMBEDDINGS[self.embedding] is not None), ("input", self.cells is not None)):
            if needs_grid and acts:
                whole = f"mtr.grouping={LINES}" if self.keeps_grid else f"mtr.paths={self.paths}"
                raise UserError(
                    f"mtr.{part}={getattr(self, part)} with {whole}, which needs a full grid: set mtr.{part}=none."
                )
        if self.cells is not None and EMBEDDINGS[self.embedding] is not None:
            raise UserError(
                f"mtr.input={self.input} and mtr.embedding={self.embedding} act both before the first block: set one "
                "to none."
            )

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

    def _reads_output(self, part: str) -> bool:
        """Whether a decision reads the output of the block by its ``score`` or its ``features``."""
        if part == "score":
            return self.scoring.reads_output
        compares = self.merging.into == "nearest" or (not self.keeps_grid and self.grouping != "asymmetric")
        return compares and self.features != "residual"

    @property
    def needs(self) -> tuple[str, ...]:
        """The evidence to collect."""
        return self.scoring.needs

    @property
    def share_alone(self) -> float | None:
        """The share of the blocks, at least the last one, that compute special tokens alone; ``None``: none does."""
        return self.read_share if self.last_block == READ and MLPS[self.mlp] is None else None

    @property
    def acts_at_other_places(self) -> bool:
        """Whether the policy acts at other places than after mixers."""
        parts = PICTURES[self.picture], EMBEDDINGS[self.embedding], MLPS[self.mlp], SCANS[self.paths]
        return self.cells is not None or self.last_block == READ or any(part is not None for part in parts)

    def only_after_mixers(self) -> "Policy":
        """This policy without its parts at other places."""
        none: dict[str, Any] = {"picture": "none", "embedding": "none", "mlp": "none", "paths": "all"}
        return replace(self, **none, input=NO_INPUT, last_block=WHOLE)

    def check(self, model: Backbone) -> None:
        """Raise a ``UserError`` if the model cannot provide what the policy reads."""
        name, scan = type(model).__name__, SCANS[self.paths]
        mixers = [block.mixer.paths for block in blocks_of(model) if block.mixer.paths]
        if self.needs and not mixers:
            raise UserError(
                f"mtr.score={self.score} reads the evidence of a scan, and {name} scans nothing: choose another score."
            )
        if scan is not None and scan.samples and not any(sampled_blocks(model, scan)):
            raise UserError(
                f"mtr.paths={self.paths} scans one of each 2 x 2 tokens of every stage but the last, in mixers that "
                f"scan a grid along four paths, and {name} has none there: choose another policy."
            )
        if self.needs and self.directions != BOTH and scan is not None and scan.skips:
            raise UserError(
                f"mtr.directions={self.directions} with mtr.paths={self.paths}, which may skip that direction: set "
                "mtr.directions=both."
            )
        for paths in mixers:
            scanned = [path.name for path in (paths if scan is None else scan.choose(paths))]
            if self.needs and self.directions != BOTH and self.directions not in scanned:
                raise UserError(
                    f"mtr.directions={self.directions}: {name} scans {', '.join(scanned)}. Name one of these, or set "
                    "mtr.directions=both for all of them."
                )
        if self.cells is not None:
            self.cells.check(model)
        if self.merges_in_mlp and not any(block.mlp is not None for block in blocks_of(model)):
            raise UserError(f"mtr.merge_at={MLP}: the blocks of {name} have no MLP. Leave mtr.merge_at={BLOCK}.")
        if self.scoring.class_token and not all(layout.special for layout in model.layouts()):
            raise UserError(
                f"mtr.score={self.score} compares tokens with the class token, and {name} has none: choose another "
                "score, or a policy that does not need it (reduction=mtr, write, rmeeto, utr, hsa, …)."
            )

    def __call__(self, state: TokenState, evidence: Evidence, remove: int) -> Plan:
        """The plan that removes that many tokens of each sequence; L - ``remove`` survive."""
        if self.keeps_grid:
            features = FEATURES[self.features](state) if self.merging.into == "nearest" else None
            rule = lines.Rule(self.window, MATCHINGS[self.matching].cosine, self.merging.mass, self.merging.normalised)
            return lines.plan(state, remove, rule, features, self.importance(state, evidence))
        length, special = int(state.index.shape[1]), int(state.special.shape[1])  # tensors under torch.jit.trace
        first, sources, targets = self._sizes(length, special, remove)
        if not 0 < remove < self._free(length, special) or sources < remove - first or targets < 1:
            raise UserError(
                f"{self.policy} cannot remove {remove} of {length} tokens, {special} of them special: "
                f"at most {self.capacity(length, special)} can go."
            )
        by_size, metadata = self.merging.mass is merge.by_size, (state.index, state.size, state.special)
        if self._is_asymmetric:
            streams = self._streams(state) if self.merging.into == "nearest" else (None, None)
            terms = self._terms(state, evidence)
            return ops.asymmetric_plan(ops.DecisionInputs(*terms, *metadata, *streams, remove, targets, by_size))
        factor = SELECTIONS[self.selection]
        if self._is_among_neighbours:
            importance = self.importance(state, evidence) if self.selection == "score" else state.size
            weight = None if factor is None else factor(state, importance)
            return ops.neighbour_plan(
                ops.NeighbourInputs(*metadata, weight, *self._streams(state), remove, by_size, grid_axes(state))
            )
        importance = self.importance(state, evidence)
        tokens = tokens_outside(state.special, length, self.zone)
        grouping = GROUPINGS[self.grouping]
        if grouping.ranked or first:
            tokens = ascending(tokens, importance)
        pruned, tokens = tokens[:, :first], tokens[:, first:]
        if first and not grouping.ranked:
            tokens = tokens.sort(dim=1).values

        source, target = grouping.split(tokens, remove - first, self.target_fraction)
        if self.merging.compares(sources, remove - first):
            matching = MATCHINGS[self.matching]
            into, similarity = matching.match(state, FEATURES[self.features](state), source, target)
            if source.shape[1] > remove - first:
                weight = None if factor is None else factor(state, importance).gather(1, source)
                distance = ops.weighted_distance(similarity, weight, cosine=matching.cosine)
                chosen = distance.argsort(dim=1, stable=True)[:, : remove - first]
                source, into = source.gather(1, chosen), into.gather(1, chosen)
        if self.merging.into == "one":
            target = target[:, :1]
            into = target.expand_as(source)
        elif self.merging.into == "nothing":
            into = torch.full_like(source, -1)

        source, into = torch.cat([pruned, source], dim=1), torch.cat([torch.full_like(pruned, -1), into], dim=1)
        key = ORDERS[self.order](state, importance, target, source)
        mass = self.merging.mass(state, importance)
        plan = make_plan(source, into, key, mass)
        if not self.merging.normalised:
            plan = plan._replace(weight=(plan.dest >= 0).to(plan.weight.dtype))
        dropped = round(self.prune_share * (remove - first))
        if dropped == 0:
            return plan
        into = into.clone()
        into[:, first : first + dropped] = -1
        return make_plan(source, into, key, mass)._replace(residual=plan)

    @property
    def _is_asymmetric(self) -> bool:
        """Whether ``ops.asymmetric_plan`` makes this policy's plans."""
        parts = self.grouping, self.matching
        return parts == ("asymmetric", "cosine") and self.merging.into in ("nearest", "nothing") and self._is_plain

    @property
    def _is_among_neighbours(self) -> bool:
        """Whether ``ops.neighbour_plan`` makes this policy's plans."""
        parts = self.grouping, self.matching
        return parts == ("alternate", "neighbours") and self.merging.into == "nearest" and self._is_plain

    @property
    def _is_plain(self) -> bool:
        """Whether all removed tokens go the same way, and the survivors keep their order: what fused decisions do."""
        return (
            self.order == "index"
            and self.merging.mass in (merge.equal, merge.by_size)
            and self.merging.normalised
            and self.prune_first == self.prune_share == self.zone == 0
        )

    def _streams(self, state: TokenState) -> tuple[Tensor | None, Tensor | None]:
        """The streams whose sum are the features, ``None`` for one that is left out."""
        hidden = state.hidden if self.features in ("stream", "hidden") else None
        residual = state.residual if self.features in ("stream", "residual") else None
        return hidden, residual

    def importance(self, state: TokenState, evidence: Evidence) -> Tensor:
        """The score of each token, (B, L) float32; higher is more important."""
        return ops.importance(*self._terms(state, evidence))

    def _terms(self, state: TokenState, evidence: Evidence) -> tuple[Tensor, float]:
        """The terms (B, K, L) whose sum over K is the score, and the divisor of that sum."""
        if self.needs and self.directions != BOTH:
            evidence = evidence.along(self.directions)
        terms = self.scoring.function(state, evidence, **({"seed": self.seed} if self.draws else {}))
        scale = evidence.channels if self.scoring.mean else 1
        return terms, float(-scale if self.score.startswith("-") else scale)

    def _sizes(self, length: int, special: int, remove: int) -> tuple[int, int, int]:
        """The numbers of tokens pruned first, of candidate sources, and of targets."""
        first = round(self.prune_first * remove)
        pool = max(0, self._free(length, special) - first)
        return first, *GROUPINGS[self.grouping].sizes(pool, remove - first, self.target_fraction)

    def _free(self, length: int, special: int) -> int:
        """The number of tokens that may go or absorb others."""
        return length - special * (1 + self.zone)

    def capacity(self, length: int, special: int) -> int:
        """The most tokens that one step can remove from ``length`` tokens, ``special`` special ones among them."""
        return _capacity(self, length, special)

    def possible(self, wanted: int, tokens: int, layout: Layout) -> int:
        """The most tokens, up to ``wanted``, that one step can remove from ``tokens`` of the tokens of a layout."""
        if self.keeps_grid:
            return max((n for n in lines.removals(tokens, layout) if n <= wanted), default=0)
        return min(wanted, self.capacity(tokens, len(layout.special)))

    def grid(self, layout: Layout, tokens: int) -> Layout:
        """The layout that convolutions over the grid are computed on when ``tokens`` remain of a layout."""
        return lines.cached_grids(layout)[tokens] if self.keeps_grid else layout

    def remaining(self, tokens: int, remove: int) -> int:
        """How many of ``tokens`` enter the next block if a block removes that many."""
        return tokens if self.merges_in_mlp else tokens - remove

    def step_flops(self, tokens: int, layout: Layout, remove: int, channels: int) -> int:
        """True FLOPs of one reduction step on ``tokens`` of the tokens of a layout, for one sequence."""
        if self.keeps_grid and remove:
            merges = self.merging.into == "nearest"
            flops = lines.flops(tokens, layout, remove, channels, merges=merges)
        else:
            among = {"axes": len(layout.axes)} if self.matching == "neighbours" else {}
            flops = self.flops(tokens, len(layout.special), remove, channels, **among)
        return flops - 2 * remove * channels if self.merges_in_mlp else flops  # of one stream

    def flops(self, length: int, special: int, remove: int, channels: int, axes: int = 2) -> int:
        """True FLOPs of one reduction step on one sequence: similarities, and applying the plan to two streams.

        ``axes``: of the grid that the tokens stood on, for matching among neighbours.
        """
        if remove == 0:
            return 0
        first, sources, targets = self._sizes(length, special, remove)
        compared = self.merging.compares(sources, remove - first)
        pairs = MATCHINGS[self.matching].comparisons(sources, targets, axes) if compared else 0
        return 2 * pairs * channels + 2 * 2 * remove * channels


@cache
def _capacity(policy: Policy, length: int, special: int) -> int:
    for remove in range(policy._free(length, special) - 1, 0, -1):
        first, sources, targets = policy._sizes(length, special, remove)
        if sources >= remove - first and targets >= 1:
            return remove
    return 0


def policy_names() -> tuple[str, ...]:
    """The policies of the package: the files in conf/reduction."""
    return tuple(policy_files())


def policy_config(policy: str | Path | Policy, /, **changes: Any) -> dict[str, Any]:
    """The configuration of a policy, with changes.

    Args:
        policy: the name of a policy of the package, the path of a YAML file, or a policy, which has no schedule and
            gets that of ``mtr``.

    Raises:
        UserError: an unknown policy or key, or a file that is no policy's.
    """
    if isinstance(policy, Policy):
        config = read_policy(find_policy("mtr")) | {field.name: getattr(policy, field.name) for field in fields(policy)}
    else:
        config = read_policy(find_policy(policy))
    for key in changes:
        if key not in config:
            raise unknown(f"argument of policy {config['policy']}", key, config)
    return {**config, **changes}


def make_policy(config: Mapping[str, Any], kind: type[Policy] = Policy) -> Policy:
    """The policy that a configuration describes; keys of the schedule are ignored."""
    return kind(**{field.name: config[field.name] for field in fields(kind) if field.name in config})
