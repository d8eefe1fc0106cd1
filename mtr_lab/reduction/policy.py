"""A reduction policy: which tokens go, and what becomes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor

from mtr_lab import ops
from mtr_lab.backbones import Backbone, blocks_of
from mtr_lab.configuration import CONF
from mtr_lab.errors import UserError, unknown
from mtr_lab.measure.flops import Work
from mtr_lab.reduction.group import GROUPINGS, ascending
from mtr_lab.reduction.match import FEATURES, MATCHINGS
from mtr_lab.reduction.order import ORDERS
from mtr_lab.reduction.places import EMBEDDINGS, MLPS, PICTURES, SCANS
from mtr_lab.reduction.plan import Plan, make_plan
from mtr_lab.reduction.score import SCORES, Score
from mtr_lab.tokens import PATHS, Evidence, Layout, TokenState
from mtr_lab.tokens.pooling import ordinary_tokens

EVIDENCE = (*ops.STATS, "b", "c")
MERGES = ("mean", "size", "fuse", "prune")
BOTH = "both"


@dataclass(frozen=True)
class Policy:
    """Score → group → match → plan, each step a named part. The defaults of a policy are its file in conf/reduction.

    Args:
        policy: its name.
        score: importance, a name of ``score.SCORES``; a minus in front negates it.
        directions: whose evidence counts, ``both`` for all scan directions, or the name of one (``forward``, …).
        grouping: a name of ``group.GROUPINGS``.
        target_fraction: share of the tokens that are not sources which are targets (``asymmetric``).
        matching: a name of ``match.MATCHINGS``.
        features: what is compared, a name of ``match.FEATURES``.
        merge: ``mean`` of the tokens that become one; the mean weighted by ``size``, how many tokens each stands for;
            ``fuse`` all removed tokens into one, weighted by exp(score); or ``prune`` them.
        prune_first: share of the removed tokens that is pruned by score before any grouping (PuMer).
        prune_share: share of the merged tokens, the most similar ones, that is pruned from the block's output and
            merged in the residual stream alone (UTR).
        order: of the survivors, a name of ``order.ORDERS``.
        align: decay the scan's state over pruned tokens from the next block on (HSA).
        stretch: power of its size by which Δ of a merged token is multiplied from the next block on: one token that
            stands for several then writes, and lets the past fade, for longer.
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
    picture: str
    embedding: str
    mlp: str
    paths: str

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
        for share in ("target_fraction", "prune_first", "prune_share", "stretch"):
            value = getattr(self, share)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UserError(f"mtr.{share} must be in [0, 1], got {value!r}.")
        if self.merge == "fuse" and self.grouping != "asymmetric":
            raise UserError("mtr.merge=fuse fuses the least important tokens: it needs mtr.grouping=asymmetric.")

    @property
    def scoring(self) -> Score:
        """The score's function and what it reads."""
        return SCORES[self.score.removeprefix("-")]

    @property
    def needs(self) -> tuple[str, ...]:
        """The evidence to collect."""
        return self.scoring.needs

    @property
    def acts_elsewhere(self) -> bool:
        """Whether it does anything at another place than after a mixer."""
        return any(table[name] for name, table in self._elsewhere())

    def _elsewhere(self) -> list[tuple[str, Mapping[str, Any]]]:
        return [(self.picture, PICTURES), (self.embedding, EMBEDDINGS), (self.mlp, MLPS), (self.paths, SCANS)]

    def after_mixers(self) -> "Policy":
        """The same without what it does elsewhere."""
        return replace(self, picture="none", embedding="none", mlp="none", paths="all")

    def picture_size(self, model: Backbone, img_size: Sequence[int] | None) -> Sequence[int] | None:
        """(height, width) of the picture that the backbone is given for one of ``img_size``; ``None``: its own size."""
        part = PICTURES[self.picture]
        if part is None:
            return img_size
        height, width = img_size or model.input_shape[-2:]
        return part.size(height, width)

    def embedded(self, layout: Layout) -> int:
        """How many tokens of a sequence go before the first block."""
        part = EMBEDDINGS[self.embedding]
        return 0 if part is None else part.removes(layout)

    def work(self, remove: Sequence[int], layout: Layout) -> Work:
        """What is left to compute; ``layout`` is the first stage's."""
        mlp, scan = MLPS[self.mlp], SCANS[self.paths]
        work = Work(remove, self.embedded(layout))
        work = work if mlp is None else replace(work, mlp=mlp.removes)
        return work if scan is None else replace(work, paths=scan.choose)

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
        name, mixers = type(model).__name__, [block.mixer for block in blocks_of(model)]
        scanned = list(dict.fromkeys(path.name for mixer in mixers for path in mixer.paths))
        if self.needs and not scanned:
            raise UserError(
                f"mtr.score={self.score} reads what a scan shows, and {name} has none: choose another score."
            )
        if self.directions != BOTH and self.directions not in scanned:
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
                f"{self.policy} cannot remove {remove} of {length} tokens, {special} of them protected: "
                f"at most {self.capacity(length, special)} can go."
            )
        if self._is_asymmetric:
            merges = self.merge != "prune"
            hidden = state.hidden if merges and self.features in ("stream", "hidden") else None
            residual = state.residual if merges and self.features in ("stream", "residual") else None
            known, by_size = (state.index, state.size, state.special), self.merge == "size"
            terms = self._terms(state, evidence)
            return ops.asymmetric_plan(*terms, *known, hidden, residual, remove, targets, by_size=by_size)
        importance = self.importance(state, evidence)
        tokens = ordinary_tokens(state.special, length)
        grouping = GROUPINGS[self.grouping]
        if grouping.ranked or first:
            tokens = ascending(tokens, importance)
        pruned, tokens = tokens[:, :first], tokens[:, first:]
        if first and not grouping.ranked:
            tokens = tokens.sort(dim=1).values

        if self.merge == "fuse":
            source, target = tokens[:, : remove - first], tokens[:, remove - first : remove - first + 1]
            into = target.expand(-1, remove - first)
        else:
            source, target = grouping.split(tokens, remove - first, self.target_fraction)
            if self._matches(length, special, remove):
                into, similarity = MATCHINGS[self.matching](FEATURES[self.features](state), source, target)
                if source.shape[1] > remove - first:
                    chosen = similarity.argsort(dim=1, descending=True, stable=True)[:, : remove - first]
                    source, into = source.gather(1, chosen), into.gather(1, chosen)
            if self.merge == "prune":
                into = torch.full_like(source, -1)

        source, into = torch.cat([pruned, source], dim=1), torch.cat([torch.full_like(pruned, -1), into], dim=1)
        key = ORDERS[self.order](state, importance, target, source)
        plan = make_plan(source, into, key, self._mass(state, importance))
        dropped = round(self.prune_share * (remove - first))
        if dropped == 0:
            return plan
        into = into.clone()
        into[:, first : first + dropped] = -1
        return make_plan(source, into, key, self._mass(state, importance))._replace(residual=plan)

    @property
    def _is_asymmetric(self) -> bool:
        """Whether the policy is of the form ``ops.asymmetric_plan`` decides. It never leaves the original order."""
        return (
            (self.grouping, self.matching, self.order) == ("asymmetric", "cosine", "index")
            and self.merge in ("mean", "size", "prune")
            and self.prune_first == self.prune_share == 0
        )

    def importance(self, state: TokenState, evidence: Evidence) -> Tensor:
        """The score of each token, (B, L) float32; higher is more important."""
        terms, scale = self._terms(state, evidence)
        # By additions instead of a reduction over so few.
        return torch.nan_to_num(reduce(torch.add, terms.unbind(1)) / scale).float()

    def _terms(self, state: TokenState, evidence: Evidence) -> tuple[Tensor, float]:
        """What is summed to the scores, (B, K, L), and by what the sums are divided."""
        chosen = evidence if self.directions == BOTH else evidence.along(self.directions)
        terms = self.scoring.function(state, chosen)
        scale = evidence.channels if self.scoring.mean else 1
        return terms, float(-scale if self.score.startswith("-") else scale)

    def _mass(self, state: TokenState, importance: Tensor) -> Tensor:
        if self.merge == "fuse":
            return importance.exp()
        return state.size if self.merge == "size" else torch.ones_like(state.size)

    def _sizes(self, length: int, special: int, remove: int) -> tuple[int, int, int]:
        """How many tokens are pruned first, and how many candidate sources and targets there are after that."""
        first = round(self.prune_first * remove)
        pool = length - special - first
        return first, *GROUPINGS[self.grouping].sizes(pool, remove - first, self.target_fraction)

    def _matches(self, length: int, special: int, remove: int) -> bool:
        """Whether tokens have to be compared: to find where one goes, or which of the candidates go."""
        first, sources, _ = self._sizes(length, special, remove)
        return remove > first and self.merge != "fuse" and (self.merge != "prune" or sources > remove - first)

    def capacity(self, length: int, special: int) -> int:
        """How many of ``length`` tokens, ``special`` of them protected, one step can remove at most."""
        return _capacity(self, length, special)

    def flops(self, length: int, special: int, remove: int, channels: int) -> int:
        """True FLOPs of one reduction step on one image: the similarities, and applying the plan to two streams."""
        if remove == 0:
            return 0
        _, sources, targets = self._sizes(length, special, remove)
        similarities = 2 * sources * targets * channels if self._matches(length, special, remove) else 0
        return similarities + 2 * 2 * remove * channels


@cache
def _capacity(policy: Policy, length: int, special: int) -> int:
    for remove in range(length - special - 1, 0, -1):
        first, sources, targets = policy._sizes(length, special, remove)
        if sources >= remove - first and targets >= 1:
            return remove
    return 0


@cache
def policy_names() -> tuple[str, ...]:
    """The policies there are: the files in conf/reduction."""
    return tuple(sorted(path.stem for path in (CONF / "reduction").glob("*.yaml")))


def policy_config(name: str, **changes: Any) -> dict[str, Any]:
    """A policy's configuration, from its file, with ``changes`` made to it.

    Raises:
        UserError: an unknown policy or key.
    """
    if name not in policy_names():
        raise unknown("policy", name, policy_names())
    config = _read(name)
    for key in changes:
        if key not in config:
            raise unknown(f"argument of policy {name}", key, config)
    return {**config, **changes}


def _read(name: str) -> dict[str, Any]:
    """A file of conf/reduction on top of those its defaults list names."""
    from omegaconf import OmegaConf  # not at every import of the library

    own: dict[str, Any] = dict(OmegaConf.to_container(OmegaConf.load(CONF / "reduction" / f"{name}.yaml")))  # type: ignore[arg-type]
    config: dict[str, Any] = {}
    for base in own.pop("defaults", ["_self_"]):
        config |= own if base == "_self_" else _read(base)
    return config


def make_policy(config: Mapping[str, Any]) -> Policy:
    """The policy a configuration describes; keys that belong to the schedule are left aside."""
    return Policy(**{field.name: config[field.name] for field in fields(Policy)})
