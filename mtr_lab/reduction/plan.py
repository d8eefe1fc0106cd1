"""A reduction plan: where every token of a batch goes. A policy decides one, ``apply`` carries it out."""

from typing import NamedTuple

import torch
from torch import Tensor

from mtr_lab import ops
from mtr_lab.backbones import TokenState


class Plan(NamedTuple):
    """B images, L tokens in, M survivors out."""

    dest: Tensor
    """(B, L) int64, the output position each token goes to, -1 if it is dropped."""
    weight: Tensor
    """(B, L) float32, the share of each token in the token it becomes part of."""
    keep: Tensor
    """(B, M) int64, the survivors in output order: the input position of each."""
    gone: Tensor
    """(B, L - M) int64, the input positions of all others."""
    residual: "Plan | None" = None
    """What happens to the residual stream, if that is something else; the survivors are the same."""


def make_plan(source: Tensor, into: Tensor, key: Tensor, mass: Tensor) -> Plan:
    """The plan that removes some tokens by merging them into others or dropping them.

    Args:
        source: (B, r) positions of the tokens to remove, all different within an image.
        into: (B, r) the survivor each of them is merged into, -1 to drop it.
        key: (B, L) floating point and finite; the survivors are put in ascending order of it.
        mass: (B, L) tokens that become one are averaged with these weights (ones: the plain mean).
    """
    batch, length = key.shape
    keep = key.scatter(1, source, torch.inf).argsort(dim=1, stable=True)[:, : length - source.shape[1]]

    slots = torch.arange(keep.shape[1], device=key.device).expand(batch, -1)
    dest = torch.full((batch, length), -1, dtype=torch.int64, device=key.device).scatter_(1, keep, slots)
    merged = torch.where(into < 0, -1, dest.gather(1, into.clamp(min=0)))
    dest = dest.scatter(1, source, merged)

    alive = dest.clamp(min=0)
    mass = mass.to(torch.float32).masked_fill(dest < 0, 0)
    total = torch.zeros(keep.shape, dtype=torch.float32, device=key.device).scatter_add_(1, alive, mass)
    return Plan(dest, mass / total.gather(1, alive), keep, source)


def apply(plan: Plan, state: TokenState) -> TokenState:
    """Carry out a plan on both streams and on all that is known of the tokens."""
    dest, weight, keep, gone, _ = plan
    other = plan.residual or plan
    alive = dest.clamp(min=0)
    size = torch.zeros_like(keep, dtype=state.size.dtype)
    source = state.source
    if source is not None:
        source = torch.where(source < 0, -1, dest.gather(1, source.clamp(min=0)))
    return TokenState(
        hidden=ops.apply_plan(state.hidden, dest, weight, keep, gone),
        residual=None
        if state.residual is None
        else ops.apply_plan(state.residual, other.dest, other.weight, keep, gone),
        index=state.index.gather(1, keep),
        size=size.scatter_add_(1, alive, state.size.masked_fill(dest < 0, 0)),
        special=dest.gather(1, state.special),
        source=source,
    )
