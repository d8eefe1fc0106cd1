"""The sum over the paths of a scan whose outputs were stored apart, and the gate or the norm that follows."""

import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.formulas import silu
from mtr_lab.ops.gpu.occupancy import on_its_device, rows

VALUES = 1024  # of a program: channels of one or several tokens


@on_its_device
def add_paths(
    outputs: Tensor,
    z: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """``layer_norm(silu(z) * outputs.sum(0))``, accumulated in float32.

    Args:
        outputs: of the paths, (G, B, L, E), contiguous.
        z: (B, L, E), copied unless its rows are contiguous and evenly spaced; ``None`` for no gate.
        norm_weight: (E,); ``None`` for no norm.
        norm_bias: (E,); ``None`` for zeros.

    Returns:
        (B, L, E) in the dtype of ``outputs``.
    """
    paths, images, length, channels = outputs.shape
    y = outputs.new_empty(images, length, channels)
    z = None if z is None else rows(z)
    width = triton.next_power_of_2(channels)
    tokens = max(1, VALUES // width)
    _add_paths[(triton.cdiv(images * length, tokens),)](
        outputs, z, norm_weight, norm_bias, y, images * length, channels, 0 if z is None else z.stride(1), eps, G=paths,
        T=tokens, E=width, num_warps=4,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["count"])
def _add_paths(outputs, z, norm_weight, norm_bias, y, count, channels: tl.constexpr, stride_z: tl.constexpr, eps,
               G: tl.constexpr, T: tl.constexpr, E: tl.constexpr):  # fmt: skip
    t, e = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T), tl.arange(0, E)
    here = e < channels
    mask = (t < count)[:, None] & here[None, :]
    at = t[:, None] * channels + e[None, :]
    total = tl.zeros((T, E), tl.float32)
    for g in tl.static_range(G):
        total += tl.load(outputs + g * count.to(tl.int64) * channels + at, mask, 0).to(tl.float32)
    if z is not None:
        z_t = tl.load(z + t[:, None] * stride_z + e[None, :], mask, 0).to(tl.float32)
        total *= silu(z_t)
    if norm_weight is not None:
        total = tl.where(mask, total - tl.sum(total, 1, keep_dims=True) / channels, 0)
        total *= tl.rsqrt(tl.sum(total * total, 1, keep_dims=True) / channels + eps)
        total *= tl.load(norm_weight + e, here, 0).to(tl.float32)[None, :]
        if norm_bias is not None:
            total += tl.load(norm_bias + e, here, 0).to(tl.float32)[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask)
