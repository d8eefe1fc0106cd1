"""A reduction policy: which tokens go, and what becomes of them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from mtr_lab.backbones import Evidence, TokenState
from mtr_lab.configuration import CONF
from mtr_lab.errors import UserError, unknown
from mtr_lab.reduction.parts import FEATURES, GROUPINGS, MATCHINGS, MERGES, ORDERS, SCORES, num_targets
from mtr_lab.reduction.plan import Plan, make_plan


@dataclass(frozen=True)
class Policy:
    """Score → group → match → plan, each step a named part; see ``mtr_lab.reduction.parts``.

    The defaults of a policy are its file in conf/reduction.

    Raises:
        UserError: the name of a part is unknown, or a number is out of its range.
    """

    policy: str
    score: str
    grouping: str
    target_fraction: float
    matching: str
    features: str
    merge: str
    order: str

    def __post_init__(self) -> None:
        tables: dict[str, Mapping[str, Any]] = {
            "score": SCORES,
            "grouping": GROUPINGS,
            "matching": MATCHINGS,
            "features": FEATURES,
            "merge": MERGES,
            "order": ORDERS,
        }
        for part, table in tables.items():
            if getattr(self, part) not in table:
                raise unknown(f"mtr.{part}", str(getattr(self, part)), table)
        if not isinstance(self.target_fraction, int | float) or not 0 < self.target_fraction <= 1:
            raise UserError(f"mtr.target_fraction must be in (0, 1], got {self.target_fraction!r}.")

    @property
    def needs(self) -> tuple[str, ...]:
        """The evidence the score reads."""
        return SCORES[self.score][1]

    def __call__(self, state: TokenState, evidence: Evidence, remove: int) -> Plan:
        """Decide what becomes of each token; ``remove`` of them do not survive."""
        length, special = state.index.shape[1], state.special.shape[1]
        if not 0 < remove < length - special:
            raise UserError(
                f"cannot remove {remove} of {length} tokens, {special} of them protected: "
                f"at most {length - special - 1} can go, so that one is left to merge into."
            )
        score = SCORES[self.score][0](state, evidence)
        source, target = GROUPINGS[self.grouping](score, state.special, remove, self.target_fraction)
        into = MATCHINGS[self.matching](FEATURES[self.features](state), source, target)
        return make_plan(source, into, ORDERS[self.order](state, score), MERGES[self.merge](state))

    def flops(self, length: int, special: int, remove: int, channels: int) -> int:
        """True FLOPs of one reduction step on one image: the similarities, and merging two streams."""
        if remove == 0:
            return 0
        targets = num_targets(length, special, remove, self.target_fraction)
        return 2 * remove * targets * channels + 2 * 2 * remove * channels


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
    config: dict[str, Any] = dict(OmegaConf.to_container(OmegaConf.load(CONF / "reduction" / f"{name}.yaml")))  # type: ignore[arg-type]
    for key in changes:
        if key not in config:
            raise unknown(f"argument of policy {name}", key, config)
    return {**config, **changes}


def make_policy(config: Mapping[str, Any]) -> Policy:
    """The policy a configuration describes; keys that belong to the schedule are left aside."""
    return Policy(**{field.name: config[field.name] for field in fields(Policy)})
