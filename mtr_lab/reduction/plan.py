"""A reduction plan: where every token of a batch goes. A policy decides one, ``apply`` carries it out."""

import torch
from torch import Tensor

from mtr_lab.ops import Plan
from mtr_lab.tokens import TokenState


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


def apply(plan: Plan, state: TokenState) -> TokenState:
    """The survivors of a plan, both streams reduced."""
    return state.reduced(plan).applied()
