"""A reduction plan: where every token of a batch goes. A policy decides one, ``apply`` carries it out."""

import torch
from torch import Tensor

from mtr_lab import ops
from mtr_lab.backbones import TokenState
from mtr_lab.ops import Plan


def make_plan(source: Tensor, into: Tensor, key: Tensor, mass: Tensor) -> Plan:
    """The plan that removes some tokens by merging them into others or dropping them.

    Args:
        source: (B, r) positions of the tokens to remove, all different within an image.
        into: (B, r) the survivor each of them is merged into, -1 to drop it.
        key: (B, L) floating point and finite; the survivors are put in ascending order of it.
        mass: (B, L) tokens that become one are averaged with these weights (ones: the plain mean). No gradient flows
            through them: a plan is a decision.
    """
    batch, length = key.shape
    keep = key.scatter(1, source, torch.inf).argsort(dim=1, stable=True)[:, : length - source.shape[1]]

    slots = torch.arange(keep.shape[1], device=key.device).expand(batch, -1)
    dest = torch.full((batch, length), -1, dtype=torch.int64, device=key.device).scatter_(1, keep, slots)
    merged = torch.where(into < 0, -1, dest.gather(1, into.clamp(min=0)))
    dest = dest.scatter(1, source, merged)

    alive = dest.clamp(min=0)
    mass = mass.detach().to(torch.float32).masked_fill(dest < 0, 0)
    total = torch.zeros(keep.shape, dtype=torch.float32, device=key.device).scatter_add_(1, alive, mass)
    return Plan(dest, mass / total.gather(1, alive), keep, source)


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
