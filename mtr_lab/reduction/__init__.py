"""Token reduction: policies decide which tokens are removed, schedules how many, ``patch`` attaches both to a model."""

from mtr_lab.reduction.budgets import MAX_DROP, SPEEDUP, Budget
from mtr_lab.reduction.handle import Reduction
from mtr_lab.reduction.patching import patch, unpatch
from mtr_lab.reduction.plan import Plan, apply
from mtr_lab.reduction.policy import Policy, make_policy, policy_config, policy_names
from mtr_lab.reduction.schedule import AUTO, MEASURED, NO_TOKENS, Schedule, make_schedule
from mtr_lab.reduction.solver import measured_on_images
from mtr_lab.reduction.tracing import TracedBlock, trace, trace_blocks
from mtr_lab.tokens import RESTORATIONS, check_restoration, restore

__all__ = [
    "AUTO",
    "MAX_DROP",
    "MEASURED",
    "NO_TOKENS",
    "RESTORATIONS",
    "SPEEDUP",
    "Budget",
    "Plan",
    "Policy",
    "Reduction",
    "Schedule",
    "TracedBlock",
    "apply",
    "check_restoration",
    "make_policy",
    "make_schedule",
    "measured_on_images",
    "patch",
    "policy_config",
    "policy_names",
    "restore",
    "trace",
    "trace_blocks",
    "unpatch",
]
