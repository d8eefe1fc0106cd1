"""Tensors as the arrays that kernels read."""

import functools

import numpy as np
import torch
from torch import Tensor

NO_GAP, NO_FACTOR = np.zeros((0, 0, 0), np.float32), np.zeros((0, 0), np.float32)
NO_POSITIONS = np.zeros((0, 0), np.int64)


def array(x: Tensor) -> np.ndarray:
    if x.requires_grad or x.dtype != torch.float32 or not x.is_contiguous():
        x = x.detach().float().contiguous()
    return x.numpy()


def memory_of(x: Tensor) -> np.ndarray:
    """The array of a float32 tensor, or of the bits of a bfloat16 tensor."""
    x = x.detach() if x.requires_grad else x
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def rows(x: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """The flat memory from the first to the last element of (…, E), and the strides of all dimensions but the last.

    So one kernel reads contiguous tensors and slices of larger ones without a copy, and channels are contiguous.
    """
    if x.dtype not in (torch.float32, torch.bfloat16):
        x = x.float()
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.is_contiguous():
        return memory_of(x).reshape(-1), x.stride()[:-1]
    extent = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return memory_of(x.as_strided((extent,), (1,))), x.stride()[:-1]


@functools.lru_cache(256)
def raster(length: int, reverse: tuple[int, ...]) -> np.ndarray:
    """(G, 1, L), the token order of each direction, or its reverse."""
    steps = np.arange(length)
    return np.stack([steps[::-1] if backward else steps for backward in reverse])[:, None]


@functools.lru_cache(256)
def whole(directions: int, images: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(G, B) each: the first token of each sequence, the end of its tokens, and the row of the first in (G · B · L)."""
    start = np.arange(0, directions * images * length, length).reshape(directions, images)
    return np.zeros_like(start), np.full_like(start, length), start


@functools.lru_cache(256)
def flags(reverse: tuple[int, ...]) -> np.ndarray:
    """(G,), which directions read backwards."""
    return np.array(reverse)


def add_blocks(sums: Tensor) -> Tensor:
    """Sum over the first dimension, one after the other: the order in ``torch.sum`` may depend on the batch size."""
    return functools.reduce(torch.add, sums) if sums.numel() else sums[0]
