"""The patch embedding as one Triton kernel: a matrix product with patches read from the image, plus positions."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.ops.gpu.occupancy import num_sms, on_its_device, precision, product, registers

TOKENS, CHANNELS, WARPS = 128, 128, 8  # of a program
PIXELS = 64  # of each token, in one step of the product


@triton.jit(do_not_specialize=["x_b", "x_c", "x_h", "columns", "tokens", "length", "place"])
def _embed(x, weight, bias, class_token, positions, y, x_b, x_c, x_h, columns, tokens, length, place,
           channels: tl.constexpr, K: tl.constexpr, P: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr,
           T: tl.constexpr, E: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """T tokens, E channels; the strides of x are in units of V elements. Programs that share pixels are neighbours."""
    c = tl.program_id(0) * E + tl.arange(0, E)
    row = tl.program_id(1) * T + tl.arange(0, T)
    channel_mask, row_mask = c < channels, row < tokens
    image, j = (row // length).to(tl.int64), row % length
    patch = j - (j > place)
    x += image * (x_b * V) + patch // columns * P * (x_h * V) + patch % columns * P
    pixel_mask = row_mask & (j != place)  # all tokens but the class token
    # Added before the product, not after it with the positions, to save registers there.
    shift = tl.load(bias + c, channel_mask, 0).to(tl.float32)
    own = tl.load(class_token + c, channel_mask, 0).to(tl.float32)
    total = tl.where((j == place)[:, None], own[None, :], shift[None, :])
    for start in range(0, K, D):
        k = start + tl.arange(0, D)
        at = (k // (P * P)).to(tl.int64) * (x_c * V) + k // P % P * (x_h * V) + k % P
        pixels = tl.load(x[:, None] + at[None, :], pixel_mask[:, None] & (k < K)[None, :], 0)
        w = tl.load(weight + c[None, :] * K + k[:, None], channel_mask[None, :] & (k < K)[:, None], 0)
        total = product(pixels, w, total, PRECISION)
    mask = row_mask[:, None] & channel_mask[None, :]
    total += tl.load(positions + j[:, None] * channels + c[None, :], mask, 0).to(tl.float32)
    tl.store(y + row.to(tl.int64)[:, None] * channels + c[None, :], total.to(y.dtype.element_ty), mask)


@on_its_device
def patch_tokens(
    images: Tensor, weight: Tensor, bias: Tensor, class_token: Tensor, positions: Tensor, place: int
) -> Tensor:
    """The contract of ``mtr_lab.ops.patch_tokens``, on a GPU."""
    x = images if images.stride(3) == 1 else images.contiguous()
    parameters = (t.contiguous() for t in (weight, bias, class_token, positions))
    channels, _, _, size = weight.shape
    length = positions.shape[1]
    tokens = len(x) * length
    y = x.new_empty(len(x), length, channels)
    strides = x.stride()[:3]
    vector = math.gcd(8, *strides)  # tells the compiler how many elements a load may take at once
    part = divisor(tokens, channels, x.device)
    block = min(max(triton.next_power_of_2(channels), 16), CHANNELS // part)
    _embed[triton.cdiv(channels, block), triton.cdiv(tokens, TOKENS // part)](
        x, *parameters, y, *(stride // vector for stride in strides), x.shape[3] // size, tokens, length, place,
        channels, K=weight[0].numel(), P=size, V=vector, PRECISION=precision(x.dtype),
        T=TOKENS // part, E=block, D=PIXELS, num_warps=WARPS // part, num_stages=3, **registers(128),
    )  # fmt: skip
    return y


def divisor(tokens: int, channels: int, device: torch.device) -> int:
    """Divisor of a program's tokens, channels and warps: 2 if full programs are fewer than the multiprocessors."""
    programs = triton.cdiv(tokens, TOKENS) * triton.cdiv(channels, CHANNELS)
    return 2 if programs < num_sms(device) else 1
