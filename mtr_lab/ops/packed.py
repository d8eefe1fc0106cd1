"""The parameters of a Mamba mixer, as in the model and packed for the kernels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PerDirection = Tensor | Sequence[Tensor]
"""A parameter of G directions: one tensor (G, *), or G tensors, which are stacked when they are read."""


class MambaWeights(NamedTuple):
    """The parameters of a mixer's G directions, without in_proj and out_proj. R = dt_rank; shapes of one direction."""

    conv_weight: PerDirection
    """(E, 1, W), of a depthwise ``nn.Conv1d``."""
    conv_bias: PerDirection
    """(E,)."""
    x_proj: PerDirection
    """(R + 2N, E): the rows of the low-rank Δ, then B, then C."""
    dt_proj: PerDirection
    """(E, R)."""
    dt_bias: PerDirection
    """(E,)."""
    A_log: PerDirection
    """(E, N), log(-A)."""
    D: PerDirection
    """(E,)."""

    @property
    def rank(self) -> int:
        return self.dt_proj[0].shape[1]

    @property
    def states(self) -> int:
        return self.A_log[0].shape[1]

    @property
    def A(self) -> Tensor:
        """The state matrix (G, E, N), negative, in float32 (float64 for float64)."""
        return state_matrix(self.A_log)


def stacked(parameter: PerDirection) -> Tensor:
    """A parameter of all directions, (G, *)."""
    return parameter if isinstance(parameter, Tensor) else torch.stack(tuple(parameter))


def state_matrix(A_log: PerDirection) -> Tensor:
    """-exp(A_log): (G, E, N) in float32 (float64 for float64)."""
    logarithms = stacked(A_log)
    return -torch.exp(logarithms.to(torch.promote_types(logarithms.dtype, torch.float32)))


class PackedWeights(NamedTuple):
    """``MambaWeights`` in the kernels' layout: R padded with zeros to a power of two from 16, N to one from 8."""

    conv_weight: Tensor
    """(G, W, E) float32."""
    conv_bias: Tensor
    """(G, E) float32."""
    projection: Tensor
    """(G, E, R + 2N) in the model's dtype: the columns of the low-rank Δ, then B, then C."""
    timescale: Tensor
    """(G, R, E) in the model's dtype."""
    timescale_bias: Tensor
    """(G, E) float32."""
    a: Tensor
    """(G, N, E) float32, negative, 0 where padded."""
    d: Tensor
    """(G, E) float32."""

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., R + 2N) -> low-rank Δ (..., R), B (..., N) and C (..., N)."""
        states = self.a.shape[1]
        return projected.split([projected.shape[-1] - 2 * states, states, states], dim=-1)


def pack(weights: MambaWeights, dtype: torch.dtype) -> PackedWeights:
    """Copy the parameters into the kernels' layout, for data of ``dtype``."""
    rank, states = weights.rank, weights.states
    padded_rank, padded_states = padded_sizes(weights)
    more_rank, more_states = padded_rank - rank, padded_states - states
    low_rank, b, c = stacked(weights.x_proj).transpose(1, 2).split([rank, states, states], dim=2)
    return PackedWeights(
        stacked(weights.conv_weight).squeeze(2).float().transpose(1, 2).contiguous(),
        stacked(weights.conv_bias).float().contiguous(),
        torch.cat([F.pad(low_rank, (0, more_rank)), *(F.pad(t, (0, more_states)) for t in (b, c))], dim=2).to(dtype),
        F.pad(stacked(weights.dt_proj).transpose(1, 2), (0, 0, 0, more_rank)).to(dtype).contiguous(),
        stacked(weights.dt_bias).float().contiguous(),
        F.pad(weights.A.float().transpose(1, 2), (0, 0, 0, more_states)).contiguous(),
        stacked(weights.D).float().contiguous(),
    )


def padded_sizes(weights: MambaWeights) -> tuple[int, int]:
    """R and N of ``PackedWeights``."""
    return max(16, _power_of_2(weights.rank)), max(8, _power_of_2(weights.states))


class PackedCache:
    """Caches a mixer's packed weights until a parameter changes.

    Changes are detected by the tensors' versions. Fused optimizers and writes to ``parameter.data`` do not bump them:
    call ``clear`` after such a change. Copies and pickles of a cache are empty.
    """

    def __init__(self) -> None:
        self.entry: tuple[Any, PackedWeights] | None = None
        """The key of the parameters, and their packed weights."""

    def get(self, weights: MambaWeights, dtype: torch.dtype) -> PackedWeights:
        """``pack(weights, dtype)``, cached."""
        parameters = [p for field in weights for p in ([field] if isinstance(field, Tensor) else field)]
        if torch.compiler.is_compiling() or any(p.is_inference() for p in parameters):
            return pack(weights, dtype)
        key = (dtype, *((p.data_ptr(), p._version, p.dtype) for p in parameters))
        entry = self.entry  # replicas of a module on several devices share the cache
        if entry is None or entry[0] != key:
            self.entry = entry = key, pack(weights, dtype)
        return entry[1]

    def clear(self) -> None:
        """Drop the packed weights."""
        if self.entry is not None and not torch.compiler.is_compiling():
            self.entry = None

    def __reduce__(self) -> tuple[type["PackedCache"], tuple[()]]:
        return PackedCache, ()


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
