"""The arguments of every implementation of the selective scan and of its gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

SCHEMA = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? z, Tensor? delta_bias, Tensor? order, "
    "Tensor? gap, Tensor? delta_scale, Tensor? repeats, int[] reverse"
)
"""``ScanInputs`` as the flat arguments of a registered operator."""


class ScanInputs(NamedTuple):
    """The arguments of ``selective_scan``. G directions, B images, L tokens, E channels, N states.

    All tensors but ``gap`` are in token order.
    """

    u: Tensor
    """Input after convolution and activation, (G, B, L, E)."""
    delta: Tensor
    """Timescale before bias and softplus, (G, B, L, E)."""
    A: Tensor
    """State matrix, negative, (G, E, N)."""
    B: Tensor
    """Input projection of each token, (G, B, L, N)."""
    C: Tensor
    """Output projection of each token, (G, B, L, N)."""
    D: Tensor
    """Skip connection, (G, E)."""
    z: Tensor | None = None
    """Gate before its SiLU, (B, L, E)."""
    delta_bias: Tensor | None = None
    """Bias of the timescale, (G, E)."""
    order: Tensor | None = None
    """Reading order, (G, B, L) int64: step s of direction g reads token ``order[g, b, s]``."""
    gap: Tensor | None = None
    """(B, G, L) in reading order: ``gap[b, g, s]`` tokens are missing just before step s of direction g."""
    delta_scale: Tensor | None = None
    """Positive factor of each token's Δ, (B, L)."""
    repeats: Tensor | None = None
    """The number of equal tokens that each token stands for, (B, L)."""
    reverse: tuple[int, ...] = (0,)
    """For each direction, 1 if it reads from the last token to the first, else 0."""


def flat(function: Callable[[ScanInputs, Any], Any]) -> Callable[..., Any]:
    """The function of ``ScanInputs`` and one more argument, taking them as the operator's flat arguments."""

    def call(*arguments: Any) -> Any:
        *inputs, last = arguments
        return function(ScanInputs._make(inputs), last)

    return call
