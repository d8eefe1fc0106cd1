"""Token reduction: score, group, match, plan, apply; and how much to remove where."""

from mtr_lab.reduction.patch import Reduction, TracedBlock, patch, trace, trace_blocks, unpatch
from mtr_lab.reduction.plan import Plan, apply
from mtr_lab.reduction.policy import Policy, make_policy, policy_config, policy_names
from mtr_lab.reduction.schedule import AUTO, Schedule, make_schedule
from mtr_lab.tokens import RESTORATIONS, check_restoration, restore

__all__ = [
    "AUTO",
    "RESTORATIONS",
    "Plan",
    "Policy",
    "Reduction",
    "Schedule",
    "TracedBlock",
    "apply",
    "check_restoration",
    "make_policy",
    "make_schedule",
    "patch",
    "policy_config",
    "policy_names",
    "restore",
    "trace",
    "trace_blocks",
    "unpatch",
]
