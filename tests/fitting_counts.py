"""Counts of tokens that a policy can remove, and the policies that any family can have."""

from collections.abc import Sequence
from typing import Any

from mtr_lab.backbones import blocks_of
from mtr_lab.reduction import make_policy, policy_config, policy_names
from mtr_lab.tokens import Layout

FOR_ANY_FAMILY = tuple(
    name
    for name, config in ((name, policy_config(name)) for name in policy_names())
    if config["paths"] != "quarter" and config["merge_at"] != "mlp" and config["frames"] is None
)


def fitting(name: str, wanted: Sequence[int], layout: Layout) -> list[int]:
    """For each block of a stage the least number of at least ``wanted`` that the policy can remove, or the most."""
    policy: Any = make_policy(policy_config(name))
    tokens, counts = layout.tokens, []
    for count in wanted:
        possible = [policy.possible(number, tokens, layout) for number in range(count, tokens) if count] or [0]
        counts.append(next((number for number in possible if number >= count), max(possible)))
        tokens -= counts[-1]
    return counts


def counts(model: Any, number: int, policy: str = "mtr") -> list[int]:
    """Remove ``number`` tokens, or more if the policy has to, at the second block and at the first of later stages."""
    starts = [0]
    for stage in model.stages[:-1]:
        starts.append(starts[-1] + len(stage.blocks))
    wanted = [number * (i == 1 or i in starts[1:]) for i in range(len(blocks_of(model)))]
    removed, layout = [], model.layouts()[0]
    for stage, (start, end) in enumerate(zip(starts, [*starts[1:], len(wanted)], strict=True)):
        if stage:
            layout = model.layout_after(stage, layout) if hasattr(model, "layout_after") else model.layouts()[stage]
        removed += fitting(policy, wanted[start:end], layout)
        layout = make_policy(policy_config(policy)).grid(layout, layout.tokens - sum(removed[start:]))
    return removed
