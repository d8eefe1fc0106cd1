"""The gradients of the depthwise convolution and its SiLU in one pass, for data that a training step streams through.

A program, one warp, slides along a run of tokens. In the step of token t a forward direction comes to the output
W - 1 tokens ahead, and a backward one to output t: both see the same W tokens of the input, and with them the gradient
of token t is complete.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.formulas import LOG2E
from mtr_lab.ops.gpu.occupancy import on_its_device, reverse_mask, rows

CHANNELS = 64  # of a program, which is one warp
RUN = 256  # tokens of a program, about
UNROLL = 4


@triton.jit
def _read(x, grad, t0, length, size, mask, channels: tl.constexpr, step_x: tl.constexpr, REVERSE: tl.constexpr,
          G: tl.constexpr, W: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """Of U steps from t0 on the last token that each sees, and the gradient of each direction's output there."""
    ahead, grads = (), ()
    for i in tl.static_range(U):
        t = t0 + i + W - 1
        ahead = ahead + (tl.load(x + t * step_x, mask & (t >= 0) & (t < length), 0),)
        for g in tl.static_range(G):
            out = t0 + i if (REVERSE >> g) & 1 else t
            grads = grads + (tl.load(grad + g * size + out * channels, mask & (out >= 0) & (out < length), 0),)
    return ahead, grads


@triton.jit(do_not_specialize=["length", "run"])
def _conv_backward(x, weight, bias, grad, dx, dw, length, run, channels: tl.constexpr, step_x: tl.constexpr,
                   step_dx: tl.constexpr, REVERSE: tl.constexpr, G: tl.constexpr, W: tl.constexpr, E: tl.constexpr,
                   U: tl.constexpr):  # fmt: skip
    runs = tl.cdiv(length, run)
    image = (tl.program_id(1) // runs).to(tl.int64)
    first = tl.program_id(1) % runs * run
    end = tl.minimum(first + run, length)
    e = tl.program_id(0) * E + tl.arange(0, E)
    mask = e < channels
    weights, biases, sums, passed = (), (), (), ()
    for g in tl.static_range(G):
        biases = biases + (tl.load(bias + g * channels + e, mask, 0),)
        for k in tl.static_range(W):
            weights = weights + (tl.load(weight + (g * W + k) * channels + e, mask, 0),)
        for _ in tl.static_range(W + 1):
            sums = sums + (tl.zeros((E,), tl.float32),)
        for _ in tl.static_range(W - 1):
            passed = passed + (tl.zeros((E,), tl.float32),)
    x += image * length * step_x + e
    dx += image * length * step_dx + e
    grad += image * length * channels + e
    size = tl.num_programs(1).to(tl.int64) // runs * length * channels
    near = ()  # tokens t to t + W - 2
    for k in tl.static_range(W - 1):
        t = first - (W - 1) + k
        near = near + (tl.load(x + t * step_x, mask & (t >= 0) & (t < length), 0).to(tl.float32),)
    start = first - (W - 1)
    ahead, grads = _read(x, grad, start, length, size, mask, channels, step_x, REVERSE, G, W, U)
    for t0 in range(start, end, U):
        # What comes next is under way while this is computed.
        more_ahead, more_grads = _read(x, grad, t0 + U, length, size, mask, channels, step_x, REVERSE, G, W, U)
        for i in tl.static_range(U):
            near = near + (ahead[i].to(tl.float32),)
            t = t0 + i
            # Each output counts once: in the first run from its first step on, in others from their first token on.
            counts = tl.where((t >= first) | (first == 0), tl.where(t < end, 1.0, 0.0), 0.0)
            total = tl.zeros((E,), tl.float32)
            more_sums, more_passed = (), ()
            for g in tl.static_range(G):
                p = biases[g]
                for k in tl.static_range(W):
                    p += weights[g * W + k] * near[W - 1 - k if (REVERSE >> g) & 1 else k]
                s = 1 / (1 + tl.exp2(-p * LOG2E))
                dp = grads[i * G + g].to(tl.float32) * s * (1 + p * (1 - s))
                counted = dp * counts
                for k in tl.static_range(W):
                    seen = near[W - 1 - k if (REVERSE >> g) & 1 else k]
                    more_sums = more_sums + (sums[g * (W + 1) + k] + counted * seen,)
                more_sums = more_sums + (sums[g * (W + 1) + W] + counted,)
                for k in tl.static_range(W - 1):  # outputs of before, from the latest on
                    w = weights[g * W + (W - 2 - k if (REVERSE >> g) & 1 else k + 1)]
                    total += w * passed[g * (W - 1) + k]
                total += weights[g * W + (W - 1 if (REVERSE >> g) & 1 else 0)] * dp
                if W > 1:
                    more_passed = more_passed + (dp,) + passed[g * (W - 1) : g * (W - 1) + W - 2]
            sums, passed = more_sums, more_passed
            tl.store(dx + t * step_dx, total.to(dx.dtype.element_ty), mask & (t >= first) & (t < end))
            near = near[1:]
        ahead, grads = more_ahead, more_grads
    dw += tl.program_id(1).to(tl.int64) * G * (W + 1) * channels + e
    for k in tl.static_range(G * (W + 1)):
        tl.store(dw + k * channels, sums[k], mask)


@on_its_device
def conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, reverse: Sequence[int], grad: Tensor, dx: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of ``mtr_lab.ops.causal_conv1d``, sums in float32.

    Args:
        x: (B, L, E), rows evenly spaced; its gradient is written to ``dx``, alike.
        weight: (G, W, E) float32.
        bias: (G, E) float32.
        grad: the gradient of the output, (G, B, L, E), contiguous.

    Returns:
        The gradients of weight and bias.
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
    total = dw.sum(0)
    return total[:, :width], total[:, width]
