"""The numerical primitives. Each has a plain PyTorch reference; ``backend`` decides which implementation runs."""

from mtr_lab.ops.apply_plan import apply_plan
from mtr_lab.ops.backend import BACKENDS, selected_backend, set_backend, use_backend
from mtr_lab.ops.causal_conv1d import causal_conv1d
from mtr_lab.ops.rms_norm import rms_norm_add
from mtr_lab.ops.selective_scan import STATS, selective_scan

__all__ = [
    "BACKENDS",
    "STATS",
    "apply_plan",
    "causal_conv1d",
    "rms_norm_add",
    "selected_backend",
    "selective_scan",
    "set_backend",
    "use_backend",
]
