"""A reduction plan: where every token of a batch goes. A policy decides one, ``apply`` carries it out."""

from mtr_lab.ops import Plan, make_plan
from mtr_lab.tokens import TokenState

__all__ = ["Plan", "apply", "make_plan"]


def apply(plan: Plan, state: TokenState) -> TokenState:
    """The survivors of a plan, both streams reduced."""
    return state.reduced(plan).applied()
