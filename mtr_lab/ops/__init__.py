"""The numerical primitives. Each has a plain PyTorch reference; ``backend`` decides which implementation runs."""

from mtr_lab.ops.backend import BACKENDS, selected_backend, set_backend, use_backend
from mtr_lab.ops.causal_conv1d import causal_conv1d
from mtr_lab.ops.mamba_inner import Layout, fuses, lay_out, mamba_inner
from mtr_lab.ops.patch_tokens import add_class_token, makes_tokens, patch_tokens
from mtr_lab.ops.plan import Plan, apply_plan, asymmetric_plan, carry_plan, decides
from mtr_lab.ops.rms_norm import reduce_streams, rms_norm_add
from mtr_lab.ops.selective_scan import STATS, selective_scan

__all__ = [
    "BACKENDS",
    "STATS",
    "Layout",
    "Plan",
    "add_class_token",
    "apply_plan",
    "asymmetric_plan",
    "carry_plan",
    "causal_conv1d",
    "decides",
    "fuses",
    "lay_out",
    "makes_tokens",
    "mamba_inner",
    "patch_tokens",
    "reduce_streams",
    "rms_norm_add",
    "selected_backend",
    "selective_scan",
    "set_backend",
    "use_backend",
]
