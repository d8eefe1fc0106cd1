"""A reduction policy: which tokens go, and what becomes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtr_lab import ops
from mtr_lab.backbones import Backbone, blocks_of
from mtr_lab.errors import UserError, check_number, unknown
from mtr_lab.measure.flops import Work
from mtr_lab.policy_files import find_policy, policy_files, read_policy
from mtr_lab.reduction import merge
from mtr_lab.reduction.group import GROUPINGS, ascending
from mtr_lab.reduction.match import FEATURES, MATCHINGS
from mtr_lab.reduction.merge import MERGES, Merge
from mtr_lab.reduction.order import ORDERS
from mtr_lab.reduction.places import EMBEDDINGS, MLPS, PICTURES, SCANS
from mtr_lab.reduction.plan import Plan, make_plan
from mtr_lab.reduction.score import SCORES, Score
from mtr_lab.tokens import PATHS, Evidence, Layout, TokenState
from mtr_lab.tokens.pooling import ordinary_tokens

EVIDENCE = (*ops.STATS, "b", "c")
BOTH = "both"


@dataclass(frozen=True)
class Policy:
    """Score → group → match → merge → order, each step a named part. Its defaults are its file in conf/reduction.

    Args:
        policy: its name.
        score: importance, a name of ``score.SCORES``; a minus in front negates it.
        directions: whose evidence counts, ``both`` for all scan directions, or the name of one (``forward``, …).
        grouping: a name of ``group.GROUPINGS``.
        target_fraction: share of the tokens that are not sources which are targets (``asymmetric``).
        matching: a name of ``match.MATCHINGS``.
        features: what is compared, a name of ``match.FEATURES``.
        merge: what becomes of the removed tokens, a name of ``merge.MERGES``: ``mean`` of those that become one, mean
            weighted by ``size``, how many tokens each stands for, ``fuse`` them all into one, or ``prune`` them.
        prune_first: share of the removed tokens that is pruned by score before any grouping (PuMer).
        prune_share: share of the merged tokens, the most similar ones, that is pruned from the block's output and
            merged in the residual stream alone (UTR).
        order: of the survivors in the sequence, a name of ``order.ORDERS``; paths over the grid keep to the grid.
        align: decay the scan's state over pruned tokens from the next block on (HSA).
        stretch: power of its size by which Δ of a merged token is multiplied from the next block on: one token that
            stands for several then writes, and lets the past fade, for longer.
        seed: of a score that draws random numbers; other scores ignore it.
        picture, embedding, mlp, paths: what is done at other places, names of ``places.PICTURES``, ``EMBEDDINGS``,
            ``MLPS`` and ``SCANS``.

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
    stretch: float
    seed: int = 0  # older configurations lack it and what follows
    picture: str = "none"
    embedding: str = "none"
    mlp: str = "none"
    paths: str = "all"

    def __post_init__(self) -> None:
        tables: dict[str, Any] = {
            "directions": (BOTH, *PATHS),
            "grouping": GROUPINGS,
            "matching": MATCHINGS,
            "features": FEATURES,
            "merge": MERGES,
            "order": ORDERS,
            "picture": PICTURES,
            "embedding": EMBEDDINGS,
            "mlp": MLPS,
            "paths": SCANS,
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
                f"mtr.align counts the tokens missing between neighbours, which mtr.order={self.order} moves: set "
                "mtr.order=index, or mtr.align=false."
            )
        for share in ("target_fraction", "prune_first", "prune_share", "stretch"):
            value = getattr(self, share)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UserError(f"mtr.{share} must be in [0, 1], got {value!r}.")
        check_number("mtr.seed", self.seed, int, 0, 2**32 - 1)
        fitting = self.merging.groupings or GROUPINGS
        if self.grouping not in fitting:
            needed = " or ".join(fitting)
            raise UserError(
                f"mtr.merge={self.merge} with mtr.grouping={self.grouping}: it needs mtr.grouping={needed}."
            )

    @property
    def scoring(self) -> Score:
        """The score's function and what it reads."""
        return SCORES[self.score.removeprefix("-")]

    @property
    def merging(self) -> Merge:
        """What the merge rule does."""
        return MERGES[self.merge]

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers, so that another ``seed`` gives another result."""
        return self.scoring.draws

    @property
    def needs(self) -> tuple[str, ...]:
        """The evidence to collect."""
        return self.scoring.needs

    @property
    def acts_at_other_places(self) -> bool:
        """Whether it does anything at another place than after a mixer."""
        return any(table[name] for name, table in self._parts_at_other_places())

    def _parts_at_other_places(self) -> list[tuple[str, Mapping[str, Any]]]:
        return [(self.picture, PICTURES), (self.embedding, EMBEDDINGS), (self.mlp, MLPS), (self.paths, SCANS)]

    def only_after_mixers(self) -> "Policy":
        """The same without what it does elsewhere."""
        return replace(self, picture="none", embedding="none", mlp="none", paths="all")

    def picture_size(self, model: Backbone, img_size: Sequence[int] | None) -> Sequence[int] | None:
        """(height, width) of the picture that the backbone is given for one of ``img_size``; ``None``: its own size."""
        part = PICTURES[self.picture]
        if part is None:
            return img_size
        height, width = img_size or model.input_shape[-2:]
        return part.size(height, width)

    def removed_at_embedding(self, layout: Layout) -> int:
        """How many tokens of a sequence go before the first block."""
        part = EMBEDDINGS[self.embedding]
        return 0 if part is None else part.removes(layout)

    def work(self, remove: Sequence[int], layout: Layout) -> Work:
        """What is left to compute; ``layout`` is the first stage's."""
        mlp, scan = MLPS[self.mlp], SCANS[self.paths]
        work = Work(remove, self.removed_at_embedding(layout))
        work = work if mlp is None else replace(work, merged_for_mlp=mlp.removes)
        return work if scan is None else replace(work, choose_paths=scan.choose)

    def embedding_flops(self, layout: Layout, channels: int) -> int:
        """True FLOPs of what is done before the first block, for one sequence."""
        part = EMBEDDINGS[self.embedding]
        return 0 if part is None else part.flops(layout, channels) + 2 * part.removes(layout) * channels

    def mlp_flops(self, tokens: int, special: int, channels: int) -> int:
        """True FLOPs of merging for an MLP, for one sequence."""
        part = MLPS[self.mlp]
        return 0 if part is None else part.flops(tokens, channels) + 2 * part.removes(tokens, special) * channels

    def check(self, model: Backbone) -> None:
        """Raise a ``UserError`` if the model lacks what the policy reads."""
        name, scan = type(model).__name__, SCANS[self.paths]
        mixers = [block.mixer.paths for block in blocks_of(model) if block.mixer.paths]
        if self.needs and not mixers:
            raise UserError(
                f"mtr.score={self.score} reads what a scan shows, and {name} has none: choose another score."
            )
        for paths in mixers:
            scanned = [path.name for path in (paths if scan is None else scan.choose(paths))]
            if self.needs and self.directions != BOTH and self.directions not in scanned:
                raise UserError(
                    f"mtr.directions={self.directions}: {name} scans {', '.join(scanned)}. Name one of these, or set "
                    "mtr.directions=both, which takes what there is."
                )
        if self.scoring.class_token and not all(layout.special for layout in model.layouts()):
            raise UserError(
                f"mtr.score={self.score} compares tokens with the class token, and {name} has none: choose another "
                "score, or a policy that does not need it (reduction=mtr, write, rmeeto, utr, hsa, …)."
            )

    def __call__(self, state: TokenState, evidence: Evidence, remove: int) -> Plan:
        """Decide what becomes of each token; ``remove`` of them do not survive."""
        length, special = int(state.index.shape[1]), int(state.special.shape[1])  # tensors under torch.jit.trace
        first, sources, targets = self._sizes(length, special, remove)
        if not 0 < remove < length - special or sources < remove - first or targets < 1:
            raise UserError(
                f"{self.policy} cannot remove {remove} of {length} tokens, {special} of them special: "
                f"at most {self.capacity(length, special)} can go."
            )
        if self._is_asymmetric:
            merges, by_size = self.merging.into == "nearest", self.merging.mass is merge.by_size
            hidden = state.hidden if merges and self.features in ("stream", "hidden") else None
            residual = state.residual if merges and self.features in ("stream", "residual") else None
            metadata = state.index, state.size, state.special
            terms = self._terms(state, evidence)
            return ops.asymmetric_plan(*terms, *metadata, hidden, residual, remove, targets, by_size=by_size)
        importance = self.importance(state, evidence)
        tokens = ordinary_tokens(state.special, length)
        grouping = GROUPINGS[self.grouping]
        if grouping.ranked or first:
            tokens = ascending(tokens, importance)
        pruned, tokens = tokens[:, :first], tokens[:, first:]
        if first and not grouping.ranked:
            tokens = tokens.sort(dim=1).values

        source, target = grouping.split(tokens, remove - first, self.target_fraction)
        if self.merging.compares(sources, remove - first):
            into, similarity = MATCHINGS[self.matching](FEATURES[self.features](state), source, target)
            if source.shape[1] > remove - first:
                chosen = similarity.argsort(dim=1, descending=True, stable=True)[:, : remove - first]
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
        dropped = round(self.prune_share * (remove - first))
        if dropped == 0:
            return plan
        into = into.clone()
        into[:, first : first + dropped] = -1
        return make_plan(source, into, key, mass)._replace(residual=plan)

    @property
    def _is_asymmetric(self) -> bool:
        """Whether the policy is of the form ``ops.asymmetric_plan`` decides. It never leaves the original order."""
        return (
            (self.grouping, self.matching, self.order) == ("asymmetric", "cosine", "index")
            and self.merging.into in ("nearest", "nothing")
            and self.merging.mass in (merge.equal, merge.by_size)
            and self.prune_first == self.prune_share == 0
        )

    def importance(self, state: TokenState, evidence: Evidence) -> Tensor:
        """The score of each token, (B, L) float32; higher is more important."""
        return ops.importance(*self._terms(state, evidence))

    def _terms(self, state: TokenState, evidence: Evidence) -> tuple[Tensor, float]:
        """What is summed to the scores, (B, K, L), and by what the sums are divided."""
        chosen = evidence.along(self.directions) if self.needs and self.directions != BOTH else evidence
        terms = self.scoring.function(state, chosen, **({"seed": self.seed} if self.draws else {}))
        scale = evidence.channels if self.scoring.mean else 1
        return terms, float(-scale if self.score.startswith("-") else scale)

    def _sizes(self, length: int, special: int, remove: int) -> tuple[int, int, int]:
        """How many tokens are pruned first, and how many candidate sources and targets there are after that."""
        first = round(self.prune_first * remove)
        pool = length - special - first
        return first, *GROUPINGS[self.grouping].sizes(pool, remove - first, self.target_fraction)

    def capacity(self, length: int, special: int) -> int:
        """How many of ``length`` tokens, ``special`` of them special, one step can remove at most."""
        return _capacity(self, length, special)

    def flops(self, length: int, special: int, remove: int, channels: int) -> int:
        """True FLOPs of one reduction step on one image: the similarities, and applying the plan to two streams."""
        if remove == 0:
            return 0
        first, sources, targets = self._sizes(length, special, remove)
        compared = self.merging.compares(sources, remove - first)
        similarities = 2 * sources * targets * channels if compared else 0
        return similarities + 2 * 2 * remove * channels


@cache
def _capacity(policy: Policy, length: int, special: int) -> int:
    for remove in range(length - special - 1, 0, -1):
        first, sources, targets = policy._sizes(length, special, remove)
        if sources >= remove - first and targets >= 1:
            return remove
    return 0


def policy_names() -> tuple[str, ...]:
    """The policies of the package: the files in conf/reduction."""
    return tuple(policy_files())


def policy_config(policy: str | Path | Policy, /, **changes: Any) -> dict[str, Any]:
    """A policy's configuration with ``changes`` made to it.

    Args:
        policy: the name of a policy of the package; the path of a YAML file; or a policy, whose schedule is then mtr's.

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
    """The policy a configuration describes; keys that belong to the schedule are left aside."""
    return kind(**{field.name: config[field.name] for field in fields(kind) if field.name in config})
