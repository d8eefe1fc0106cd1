"""A reduction plan: where every token of a batch goes. A policy decides one, ``apply`` carries it out."""

import torch

from mtr_lab import ops
from mtr_lab.backbones import TokenState
from mtr_lab.ops import Plan, make_plan

__all__ = ["Plan", "apply", "carry", "make_plan"]


def carry(plan: Plan, state: TokenState) -> TokenState:
    """What is known of the tokens after a plan; the two streams follow when they are next read."""
    index, size, special = ops.carry_plan(plan, state.index, state.size, state.special)
    source = state.source
    if source is not None:
        source = torch.where(source < 0, -1, plan.dest.gather(1, source.clamp(min=0)))
    return state._replace(index=index, size=size, special=special, source=source, plan=plan)


def apply(plan: Plan, state: TokenState) -> TokenState:
    """Carry out a plan on both streams and on all that is known of the tokens."""
    return carry(plan, state).settled()
