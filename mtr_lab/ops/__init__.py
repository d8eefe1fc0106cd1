"""The numerical operations. Each has a reference in plain PyTorch; ``registry`` picks the implementation that runs."""

import torch

from mtr_lab.ops.attention import attention
from mtr_lab.ops.convolution import causal_conv1d
from mtr_lab.ops.decision import asymmetric_plan, importance, nearest
from mtr_lab.ops.decision_inputs import DecisionInputs, NeighbourInputs
from mtr_lab.ops.depthwise import depthwise_conv2d
from mtr_lab.ops.embedding import add_class_token, patch_tokens, project_patches
from mtr_lab.ops.layer_norm import layer_norm
from mtr_lab.ops.linear import linear
from mtr_lab.ops.mixer import mamba_inner
from mtr_lab.ops.mixer_read import OUTPUT_FLOPS, STATE_FLOPS, gated, mamba_inner_read, reads_one_token
from mtr_lab.ops.neighbours import nearest_neighbour, neighbour_plan, neighbours, weighted_distance
from mtr_lab.ops.norm_add import layer_norm_add, reduce_streams, rms_norm_add
from mtr_lab.ops.packed import MambaWeights, PackedCache, PackedWeights, pack, state_matrix
from mtr_lab.ops.pairs import pair_similarity
from mtr_lab.ops.plan import Plan, apply_plan, follow, make_plan, merge_tokens, update_metadata
from mtr_lab.ops.registry import (
    BACKENDS,
    check_backend,
    decompositions,
    is_readable,
    plain_pytorch,
    selected_backend,
    set_backend,
    use_backend,
)
from mtr_lab.ops.scan import REPEAT_FLOPS, selective_scan
from mtr_lab.ops.scan_by_step import scan_by_step
from mtr_lab.ops.scan_low_rank import scan_low_rank
from mtr_lab.ops.statistics import STATS

REDUCTION_OPS = (
    torch.ops.mtr_lab.nearest,
    torch.ops.mtr_lab.pair_similarity,
    torch.ops.mtr_lab.asymmetric_plan,
    torch.ops.mtr_lab.nearest_neighbour,
    torch.ops.mtr_lab.neighbour_plan,
    torch.ops.mtr_lab.apply_plan,
    torch.ops.mtr_lab.norm_add,
)
"""The operators whose FLOPs are the overhead of a reduction. ``norm_add`` counts the FLOPs of its plan alone."""

__all__ = [
    "BACKENDS",
    "OUTPUT_FLOPS",
    "REDUCTION_OPS",
    "REPEAT_FLOPS",
    "STATE_FLOPS",
    "STATS",
    "DecisionInputs",
    "MambaWeights",
    "NeighbourInputs",
    "PackedCache",
    "PackedWeights",
    "Plan",
    "add_class_token",
    "apply_plan",
    "asymmetric_plan",
    "attention",
    "causal_conv1d",
    "check_backend",
    "decompositions",
    "depthwise_conv2d",
    "follow",
    "gated",
    "importance",
    "is_readable",
    "layer_norm",
    "layer_norm_add",
    "linear",
    "make_plan",
    "mamba_inner",
    "mamba_inner_read",
    "merge_tokens",
    "nearest",
    "nearest_neighbour",
    "neighbour_plan",
    "neighbours",
    "pack",
    "pair_similarity",
    "patch_tokens",
    "plain_pytorch",
    "project_patches",
    "reads_one_token",
    "reduce_streams",
    "rms_norm_add",
    "scan_by_step",
    "scan_low_rank",
    "selected_backend",
    "selective_scan",
    "set_backend",
    "state_matrix",
    "update_metadata",
    "use_backend",
    "weighted_distance",
]
