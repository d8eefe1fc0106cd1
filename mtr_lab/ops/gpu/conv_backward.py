"""The gradients of the depthwise convolution and its SiLU in one pass over memory, for training steps.

A program, one warp, slides a window of W tokens along a run of tokens. With the window t to t + W - 1 it recomputes
output t + W - 1 of a forward direction and output t of a backward one. These are the last outputs that read token t, so
that the gradient of token t is complete. ``conv`` has the same gradients in two kernels, for any strides and dtypes.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.formulas import LOG2E
from mtr_lab.ops.gpu.occupancy import on_its_device, reverse_mask, rows

CHANNELS = 64  # of a program, which is one warp
RUN = 256  # tokens of a program, at most
UNROLL = 4  # tokens loaded at a time


@triton.jit
def _read(x, grad, t0, length, size, mask, channels: tl.constexpr, stride_x: tl.constexpr, REVERSE: tl.constexpr,
          G: tl.constexpr, W: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """The last token of the windows t0 to t0 + U - 1, and the gradients of the outputs that they complete.

    Returns:
        U vectors of tokens, and U · G vectors of gradients, those of one window side by side.
    """
    last, grads = (), ()
    for i in tl.static_range(U):
        t = t0 + i + W - 1
        last = last + (tl.load(x + t * stride_x, mask & (t >= 0) & (t < length), 0),)
        for g in tl.static_range(G):
            out = t0 + i if (REVERSE >> g) & 1 else t
            grads = grads + (tl.load(grad + g * size + out * channels, mask & (out >= 0) & (out < length), 0),)
    return last, grads


@triton.jit(do_not_specialize=["length", "run"])
def _conv_backward(x, weight, bias, grad, dx, dw, length, run, channels: tl.constexpr, stride_x: tl.constexpr,
                   stride_dx: tl.constexpr, REVERSE: tl.constexpr, G: tl.constexpr, W: tl.constexpr, E: tl.constexpr,
                   U: tl.constexpr):  # fmt: skip
    runs = tl.cdiv(length, run)
    image = (tl.program_id(1) // runs).to(tl.int64)
    first = tl.program_id(1) % runs * run
    end = tl.minimum(first + run, length)
    e = tl.program_id(0) * E + tl.arange(0, E)
    mask = e < channels
    weights, biases, sums, earlier = (), (), (), ()
    for g in tl.static_range(G):
        biases = biases + (tl.load(bias + g * channels + e, mask, 0),)
        for k in tl.static_range(W):
            weights = weights + (tl.load(weight + (g * W + k) * channels + e, mask, 0),)
        for _ in tl.static_range(W + 1):
            sums = sums + (tl.zeros((E,), tl.float32),)
        for _ in tl.static_range(W - 1):
            earlier = earlier + (tl.zeros((E,), tl.float32),)
    x += image * length * stride_x + e
    dx += image * length * stride_dx + e
    grad += image * length * channels + e
    size = tl.num_programs(1).to(tl.int64) // runs * length * channels
    window = ()  # the first W - 1 tokens of the window
    for k in tl.static_range(W - 1):
        t = first - (W - 1) + k
        window = window + (tl.load(x + t * stride_x, mask & (t >= 0) & (t < length), 0).to(tl.float32),)
    start = first - (W - 1)
    last, grads = _read(x, grad, start, length, size, mask, channels, stride_x, REVERSE, G, W, U)
    for t0 in range(start, end, U):
        # The loads for the next windows overlap the arithmetic for these.
        next_last, next_grads = _read(x, grad, t0 + U, length, size, mask, channels, stride_x, REVERSE, G, W, U)
        for i in tl.static_range(U):
            window = window + (last[i].to(tl.float32),)
            t = t0 + i
            # Runs overlap by W - 1 windows: an output counts in one of them. Only the first run starts at output 0.
            counts = tl.where((t >= first) | (first == 0), tl.where(t < end, 1.0, 0.0), 0.0)
            total = tl.zeros((E,), tl.float32)
            new_sums, new_earlier = (), ()  # gradients of taps and bias; of the last W - 1 outputs before SiLU
            for g in tl.static_range(G):
                p = biases[g]
                for k in tl.static_range(W):
                    p += weights[g * W + k] * window[W - 1 - k if (REVERSE >> g) & 1 else k]
                s = 1 / (1 + tl.exp2(-p * LOG2E))
                dp = grads[i * G + g].to(tl.float32) * s * (1 + p * (1 - s))
                counted = dp * counts
                for k in tl.static_range(W):
                    seen = window[W - 1 - k if (REVERSE >> g) & 1 else k]
                    new_sums = new_sums + (sums[g * (W + 1) + k] + counted * seen,)
                new_sums = new_sums + (sums[g * (W + 1) + W] + counted,)
                for k in tl.static_range(W - 1):  # the earlier outputs that read token t, from the latest
                    w = weights[g * W + (W - 2 - k if (REVERSE >> g) & 1 else k + 1)]
                    total += w * earlier[g * (W - 1) + k]
                total += weights[g * W + (W - 1 if (REVERSE >> g) & 1 else 0)] * dp
                if W > 1:
                    new_earlier = new_earlier + (dp,) + earlier[g * (W - 1) : g * (W - 1) + W - 2]
            sums, earlier = new_sums, new_earlier
            tl.store(dx + t * stride_dx, total.to(dx.dtype.element_ty), mask & (t >= first) & (t < end))
            window = window[1:]
        last, grads = next_last, next_grads
    dw += tl.program_id(1).to(tl.int64) * G * (W + 1) * channels + e
    for k in tl.static_range(G * (W + 1)):
        tl.store(dw + k * channels, sums[k], mask)


@on_its_device
def conv_backward(x: Tensor, weight: Tensor, bias: Tensor, reverse: Sequence[int], grad: Tensor, dx: Tensor) -> Tensor:
    """The gradients of ``mtr_lab.ops.causal_conv1d``, accumulated in float32. Deterministic.

    Args:
        x: (B, L, E); copied unless its rows are contiguous and evenly spaced.
        weight: (G, W, E) float32.
        bias: (G, E) float32.
        reverse: for each direction, whether it reads from the last token to the first.
        grad: the gradient of the output, (G, B, L, E), contiguous.
        dx: the gradient of ``x`` is written here, (B, L, E), rows contiguous and evenly spaced.

    Returns:
        For the taps and, as tap W, for the bias, (parts, G, W + 1, E) float32; the gradient is the sum over parts.
    """
    x = rows(x)
    images, length, channels = x.shape
    directions, width, _ = weight.shape
    run = triton.cdiv(length, triton.cdiv(length, RUN))
    parts = images * triton.cdiv(length, run)
    dw = bias.new_empty(parts, directions, width + 1, channels)
    _conv_backward[triton.cdiv(channels, CHANNELS), parts](
        x, weight, bias, grad, dx, dw, length, run, channels, x.stride(1), dx.stride(1),
        REVERSE=reverse_mask(reverse), G=directions, W=width, E=CHANNELS, U=UNROLL, num_warps=1,
    )  # fmt: skip
    return dw
