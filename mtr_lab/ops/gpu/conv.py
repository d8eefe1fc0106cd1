"""Depthwise causal convolution and SiLU, all directions in one launch, and its gradients.

Data is channels-last. A program computes a tile of tokens and channels. For each tap it loads the tile shifted by some
tokens, to earlier ones, or to later ones in a backward direction; the overlap is read from the cache.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.occupancy import on_its_device, reverse_mask

CHANNELS = 64
VARYING = ["length", "reverse"]  # not specialised on these, so that other lengths do not trigger recompiles


@on_its_device
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, reverse: Sequence[int]) -> Tensor:
    """``causal_conv1d_reference`` for float32, float16 or bfloat16 data, accumulated in float32.

    Args:
        x: (B, L, E), copied unless its last stride is 1.
        weight: (G, E, W), any floating dtype.
        bias: (G, E), any floating dtype.
        reverse: for each of the G directions, whether it reads from the last token to the first.

    Returns:
        (G, B, L, E) in the dtype of ``x``.
    """
    x, weight, bias = _readable(x), weight.contiguous(), bias.contiguous()
    images, length, channels = x.shape
    directions, _, width = weight.shape
    y = x.new_empty(directions, images, length, channels)
    tokens = 16
    _forward[triton.cdiv(channels, CHANNELS), triton.cdiv(length, tokens), images](
        x, weight, bias, y, *x.stride()[:2], length, channels, reverse_mask(reverse),
        G=directions, W=width, T=tokens, E=CHANNELS, num_warps=4,
    )  # fmt: skip
    return y


@on_its_device
def causal_conv1d_backward(
    x: Tensor, weight: Tensor, bias: Tensor, reverse: Sequence[int], grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``causal_conv1d`` with respect to x, weight and bias, in their shapes and dtypes.

    Deterministic: each program writes its part of the sums over tokens and images; the parts are added afterwards.

    Args:
        x, weight, bias, reverse: as for ``causal_conv1d``.
        grad: the gradient of the output, (G, B, L, E).
    """
    x, grad = _readable(x), grad.contiguous()
    images, length, channels = x.shape
    directions, _, width = weight.shape
    w, b = weight.contiguous(), bias.contiguous()
    mask = reverse_mask(reverse)
    # The gradient before SiLU, in memory since that of x needs it for tokens of other programs and all directions.
    dp = torch.empty_like(grad)
    tokens = 32
    parts = triton.cdiv(length, tokens)
    dw = x.new_empty(directions, images, parts, width + 1, channels, dtype=torch.float32)
    _backward_weight[triton.cdiv(channels, CHANNELS), parts, directions * images](
        x, w, b, grad, dp, dw, *x.stride()[:2], length, channels, mask, images,
        W=width, T=tokens, E=CHANNELS, num_warps=4,
    )  # fmt: skip
    dx = x.new_empty(x.shape)
    tokens = 16
    _backward_input[triton.cdiv(channels, CHANNELS), triton.cdiv(length, tokens), images](
        dp, w, dx, length, channels, mask, G=directions, W=width, T=tokens, E=CHANNELS, num_warps=4
    )
    dweight, dbias = dw[..., :width, :].sum((1, 2)), dw[..., width, :].sum((1, 2))
    return dx, dweight.transpose(1, 2).contiguous().to(weight.dtype), dbias.to(bias.dtype)


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def _tap(x, k, t, e, length, channels, stride, step, W: tl.constexpr):
    """The inputs of tap k for outputs t: W - 1 - k tokens before them in reading order (``step`` 1 or -1)."""
    source = t - step * (W - 1 - k)
    mask = ((source >= 0) & (source < length))[:, None] & (e < channels)[None, :]
    return tl.load(x + source[:, None] * stride + e[None, :], mask, 0).to(tl.float32)


@triton.jit
def _before_silu(x, weight, bias, g, t, e, length, channels, stride, step, W: tl.constexpr):
    total = tl.zeros((t.shape[0], e.shape[0]), tl.float32)
    total += tl.load(bias + g * channels + e, e < channels, 0).to(tl.float32)[None, :]
    for k in tl.static_range(W):
        w = tl.load(weight + (g * channels + e) * W + k, e < channels, 0).to(tl.float32)
        total += _tap(x, k, t, e, length, channels, stride, step, W) * w[None, :]
    return total


@triton.jit(do_not_specialize=VARYING)
def _forward(x, weight, bias, y, x_i, x_l, length, channels, reverse,
             G: tl.constexpr, W: tl.constexpr, T: tl.constexpr, E: tl.constexpr):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)  # a tensor may have over 2³¹ elements
    t = tl.program_id(1) * T + tl.arange(0, T)
    e = tl.program_id(0) * E + tl.arange(0, E)
    mask = (t < length)[:, None] & (e < channels)[None, :]
    for g in tl.static_range(G):
        step = 1 - 2 * ((reverse >> g) & 1)
        p = _before_silu(x + image * x_i, weight, bias, g, t, e, length, channels, x_l, step, W)
        out = y + (g * tl.num_programs(2) + image) * length * channels
        tl.store(out + t[:, None] * channels + e[None, :], (p * tl.sigmoid(p)).to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=VARYING)
def _backward_weight(x, weight, bias, grad, dp, dw, x_i, x_l, length, channels, reverse, images,
                     W: tl.constexpr, T: tl.constexpr, E: tl.constexpr):  # fmt: skip
    """The gradient before SiLU, and this program's part of the sums for the taps and, as tap W, for the bias."""
    row = tl.program_id(2).to(tl.int64)
    g = tl.program_id(2) // images
    t = tl.program_id(1) * T + tl.arange(0, T)
    e = tl.program_id(0) * E + tl.arange(0, E)
    mask = (t < length)[:, None] & (e < channels)[None, :]
    step = 1 - 2 * ((reverse >> g) & 1)
    x += (tl.program_id(2) % images).to(tl.int64) * x_i
    at = t[:, None] * channels + e[None, :]
    p = _before_silu(x, weight, bias, g, t, e, length, channels, x_l, step, W)
    s = tl.sigmoid(p)
    grad_t = tl.load(grad + row * length * channels + at, mask, 0).to(tl.float32)
    dp_t = grad_t * s * (1 + p * (1 - s))
    dw += (row * tl.num_programs(1) + tl.program_id(1)) * (W + 1) * channels + e
    for k in tl.static_range(W):
        tl.store(dw + k * channels, tl.sum(dp_t * _tap(x, k, t, e, length, channels, x_l, step, W), 0), e < channels)
    tl.store(dw + W * channels, tl.sum(dp_t, 0), e < channels)
    tl.store(dp + row * length * channels + at, dp_t.to(dp.dtype.element_ty), mask)


@triton.jit(do_not_specialize=VARYING)
def _backward_input(dp, weight, dx, length, channels, reverse,
                    G: tl.constexpr, W: tl.constexpr, T: tl.constexpr, E: tl.constexpr):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * T + tl.arange(0, T)
    e = tl.program_id(0) * E + tl.arange(0, E)
    total = tl.zeros((T, E), tl.float32)
    for g in tl.static_range(G):
        # The transposed convolution: a token contributes to the outputs after it in reading order.
        step = 2 * ((reverse >> g) & 1) - 1
        dp_g = dp + (g * tl.num_programs(2) + image) * length * channels
        for k in tl.static_range(W):
            w = tl.load(weight + (g * channels + e) * W + k, e < channels, 0).to(tl.float32)
            total += _tap(dp_g, k, t, e, length, channels, channels, step, W) * w[None, :]
    mask = (t < length)[:, None] & (e < channels)[None, :]
    out = dx + image * length * channels + t[:, None] * channels + e[None, :]
    tl.store(out, total.to(dx.dtype.element_ty), mask)
