"""A reduction plan: the survivor that absorbs each token of a batch. A policy makes it, ``apply`` applies it."""

from mtr_lab.ops import Plan, make_plan
from mtr_lab.tokens import TokenState

__all__ = ["Plan", "apply", "make_plan"]


def apply(plan: Plan, state: TokenState) -> TokenState:
    """The state of the survivors, with both streams reduced."""
    return state.reduced(plan).applied()
