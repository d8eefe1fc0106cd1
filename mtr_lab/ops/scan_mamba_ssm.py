"""The selective scan with the authors' CUDA kernels, of mamba-ssm, and its gradients.

For shapes see ``ScanInputs``. Source: https://github.com/state-spaces/mamba.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtr_lab.ops.scan_inputs import ScanInputs
from mtr_lab.ops.statistics import channel_sums
from mtr_lab.ops.vjp import vjp


def selective_scan_mamba_ssm(inputs: ScanInputs, stats: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The authors' CUDA kernel, one launch a direction, on channels-first copies. Without ``gap`` and ``repeats``."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, A, B, C, D, z, delta_bias, order, _, delta_scale, _, reverse = inputs
    inverse = None if order is None else order.argsort(-1)

    def reordered(x: Tensor, g: int, order: Tensor | None) -> Tensor:  # (B, L, K)
        if order is None:
            return x.flip(1) if reverse[g] else x
        return x.gather(1, order[g, ..., None].expand_as(x))

    def read(x: Tensor, g: int) -> Tensor:  # (B, L, K) -> (B, K, L)
        return reordered(x, g, order).to(u.dtype).transpose(1, 2).contiguous()

    if delta_scale is not None:
        if delta_bias is not None:
            delta = delta.float() + delta_bias.float()[:, None, None, :]
        delta, delta_bias = F.softplus(delta.float()) * delta_scale[..., None], None
    ys = []
    for g in range(len(reverse)):
        y = selective_scan_fn(
            read(u[g], g),
            read(delta[g], g),
            A[g].float(),
            read(B[g], g),
            read(C[g], g),
            D[g].float(),
            # Statistics need the output before the gate.
            z=None if z is None or stats else read(z, g),
            delta_bias=None if delta_bias is None else delta_bias[g].float(),
            delta_softplus=delta_scale is None,
        ).transpose(1, 2)
        ys.append(reordered(y, g, inverse))
    if not stats:
        return torch.stack(ys).sum(0), u.new_empty(*u.shape[:3], 0, dtype=torch.float32)
    per_direction = torch.stack(ys).float()
    total = per_direction.sum(0)
    if z is not None:
        total = total * F.silu(z.float())
    step = delta.float() if delta_bias is None else delta.float() + delta_bias.float()[:, None, None, :]
    step = F.softplus(step) if delta_scale is None else step
    return total.to(u.dtype), channel_sums(stats, step, u.float(), per_direction)


def selective_scan_backward_mamba_ssm(inputs: ScanInputs, grad: Tensor) -> Sequence[Tensor | None]:
    """The gradients of the authors' CUDA kernel, without second derivatives.

    Args:
        grad: of y, (B, L, E).

    Returns:
        As ``selective_scan_backward_reference``.
    """

    def forward(*tensors: Any) -> Tensor:
        return selective_scan_mamba_ssm(ScanInputs._make((*tensors, *inputs[8:])), stats=())[0]

    return vjp(forward, inputs[:8], grad)


def is_unfit(inputs: ScanInputs, _: Any) -> str:
    """Why the authors' kernel cannot run these inputs, "" if it can."""
    if inputs.repeats is not None:
        return "cannot read a run of equal tokens in one step"
    return "" if inputs.gap is None else "cannot decay the state over removed tokens"


def has_no_gradient(inputs: ScanInputs, grad: Tensor) -> str:
    """Why the authors' kernel has no gradients of these inputs, "" if it has."""
    return is_unfit(inputs, grad) or ("has no second derivatives" if torch.is_grad_enabled() else "")
