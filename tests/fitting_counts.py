"""Counts of tokens that a policy can remove, and the policies that any family can have."""

from collections.abc import Sequence
from typing import Any

from mtr_lab.reduction import make_policy, policy_config, policy_names
from mtr_lab.tokens import Layout

FOR_ANY_FAMILY = tuple(
    name
    for name, config in ((name, policy_config(name)) for name in policy_names())
    if config["paths"] != "quarter" and config["merge_at"] != "mlp"
)


def fitting(name: str, wanted: Sequence[int], layout: Layout) -> list[int]:
    """For each block of a stage the least number of at least ``wanted`` that the policy can remove, or the most."""
    policy: Any = make_policy(policy_config(name))
    tokens, counts = layout.tokens, []
    for count in wanted:
        possible = [policy.possible(number, tokens, layout) for number in range(count, tokens)] if count else [0]
        counts.append(next((number for number in possible if number >= count), max(possible)))
        tokens -= counts[-1]
    return counts
