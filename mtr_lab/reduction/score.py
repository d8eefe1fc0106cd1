"""Importance of each token, higher is more important: state and evidence -> what is summed to it, (B, K, L).

B images, L tokens, K terms: one for each of the G scan directions where evidence is read, which is at each token's own
position, else a single one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtr_lab.tokens import Evidence, TokenState


@dataclass(frozen=True)
class Score:
    """A score and what it reads: evidence by name, and whether it compares tokens with the class token.

    With ``mean`` the terms are sums over the channels, of which the mean is meant. A function that ``draws`` random
    numbers is given the policy's ``seed``.
    """

    function: Callable[..., Tensor]
    needs: tuple[str, ...] = ()
    class_token: bool = False
    mean: bool = False
    draws: bool = False


def delta(state: TokenState, evidence: Evidence) -> Tensor:
    """MTR: the sum over channels, of which the mean is meant, of the timescale Δ (arXiv 2507.14042)."""
    return evidence["delta"]


def write(state: TokenState, evidence: Evidence) -> Tensor:
    """How much a token writes into the state: the Frobenius norm of (Δ⊙u) Bᵀ, which is ‖Δ⊙u‖·‖B‖."""
    return evidence["write"].sqrt() * evidence.projection("b").norm(dim=-1)


def output(state: TokenState, evidence: Evidence) -> Tensor:
    """HSA: the sum over channels, of which the mean is meant, of max(0, y), y the scan's output before the gate
    (arXiv 2409.18962)."""
    return evidence["output"]


def hidden(state: TokenState, evidence: Evidence) -> Tensor:
    """UTR: the sum over channels of max(0, y), y the output of the block (arXiv 2410.14725)."""
    return state.hidden.float().clamp(min=0).sum(-1)[:, None]


def b(state: TokenState, evidence: Evidence) -> Tensor:
    """The mean over states of the input projection B, an ablation of MTR's."""
    return evidence.projection("b").mean(-1)


def c(state: TokenState, evidence: Evidence) -> Tensor:
    """The mean over states of the output projection C, an ablation of MTR's."""
    return evidence.projection("c").mean(-1)


def class_token(state: TokenState, evidence: Evidence) -> Tensor:
    """Cosine similarity of the residual stream to the first class token: EViT's attention, which Mamba has not."""
    anchor = state.special_tokens()[:, :1].float()
    return F.cosine_similarity(state.stream.float(), anchor, dim=-1)[:, None]


def norm(state: TokenState, evidence: Evidence) -> Tensor:
    """The length of the residual stream after the block."""
    return state.stream.float().norm(dim=-1)[:, None]


def none(state: TokenState, evidence: Evidence) -> Tensor:
    """No importance, for policies that compare tokens only."""
    return torch.zeros_like(state.size)[:, None]


def random(state: TokenState, evidence: Evidence, seed: int) -> Tensor:
    """A random number for each original position: the same for all images, in any batch, on any machine."""
    phase = seed * 78.233 % math.tau  # 0 for seed 0; the second coordinate of the well-known shader hash
    return torch.frac(torch.sin((state.index + 1).double() * 12.9898 + phase) * 43758.5453).abs().float()[:, None]


SCORES = {
    "delta": Score(delta, ("delta",), mean=True),
    "write": Score(write, ("write", "b")),
    "output": Score(output, ("output",), mean=True),
    "hidden": Score(hidden),
    "b": Score(b, ("b",)),
    "c": Score(c, ("c",)),
    "class_token": Score(class_token, class_token=True),
    "norm": Score(norm),
    "random": Score(random, draws=True),
    "none": Score(none),
}
"""A name with a minus in front, ``-delta``, is the negated score."""
