"""The parameters of a Mamba mixer: as a model has them, and packed for the kernels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PerDirection = Tensor | Sequence[Tensor]
"""A parameter of G directions: one tensor (G, *), or G tensors, which are stacked where they are read."""


class MambaWeights(NamedTuple):
    """The parameters of G directions between a mixer's two big projections. R = dt_rank; shapes of one direction."""

    conv_weight: PerDirection
    """(E, 1, W), of a depthwise ``nn.Conv1d``."""
    conv_bias: PerDirection
    """(E,)."""
    x_proj: PerDirection
    """(R + 2N, E), the rows of the low rank first, then B, then C."""
    dt_proj: PerDirection
    """(E, R)."""
    dt_bias: PerDirection
    """(E,)."""
    A_log: PerDirection
    """(E, N), the logarithm of -A."""
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
    """``MambaWeights`` as the kernels read them. R and N are padded with zeros."""

    conv_weight: Tensor
    """(G, W, E) float32."""
    conv_bias: Tensor
    """(G, E) float32."""
    projection: Tensor
    """(G, E, R + 2N) in the model's dtype: the low rank, R a power of two from 16 on, B, then C, N one from 8 on."""
    timescale: Tensor
    """(G, R, E) in the model's dtype."""
    timescale_bias: Tensor
    """(G, E) float32."""
    a: Tensor
    """(G, N, E) float32, negative, 0 where padded."""
    d: Tensor
    """(G, E) float32."""

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., R + 2N) -> the low rank, B and C."""
        states = self.a.shape[1]
        return projected.split([projected.shape[-1] - 2 * states, states, states], dim=-1)


def pack(weights: MambaWeights, dtype: torch.dtype) -> PackedWeights:
    """Copy the parameters into the kernels' layout, for data of ``dtype``."""
    rank, states = weights.rank, weights.states
    more_rank, more_states = max(16, _power_of_2(rank)) - rank, max(8, _power_of_2(states)) - states
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


class PackedCache:
    """A mixer's packed weights, packed anew when a parameter has changed, not at every call.

    A change is seen by the tensors' versions. Fused optimisers, and what writes to ``parameter.data``, leave these as
    they are: call ``clear`` where such a change is to be expected. Copies and pickles of a cache are empty.
    """

    def __init__(self) -> None:
        self.kept: tuple[Any, PackedWeights] | None = None
        """What the weights were packed of, and the packed weights."""

    def get(self, weights: MambaWeights, dtype: torch.dtype) -> PackedWeights:
        """``pack(weights, dtype)``."""
        parameters = [p for field in weights for p in ([field] if isinstance(field, Tensor) else field)]
        if torch.compiler.is_compiling() or any(p.is_inference() for p in parameters):
            return pack(weights, dtype)
        key = (dtype, *((p.data_ptr(), p._version, p.dtype) for p in parameters))
        kept = self.kept  # replicas of a module on several devices share the cache
        if kept is None or kept[0] != key:
            self.kept = kept = key, pack(weights, dtype)
        return kept[1]

    def clear(self) -> None:
        """Forget the packed weights."""
        if self.kept is not None and not torch.compiler.is_compiling():
            self.kept = None

    def __reduce__(self) -> tuple[type["PackedCache"], tuple[()]]:
        return PackedCache, ()


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
