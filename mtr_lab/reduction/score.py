"""Scores: functions of state and evidence that return K terms for each token, (B, K, L).

The importance of a token is the sum of its terms, see ``mtr_lab.ops.importance``; higher is more important. B images, L
tokens. A score that reads evidence has a term for each of the G scan directions, any other has one term.
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
    """A score that a policy can name.

    Args:
        function: (state, evidence) -> (B, K, L), with the policy's ``seed`` as a third argument if it ``draws``.
        needs: the evidence it reads, names of ``mtr_lab.ops.STATS`` and ``"b"``, ``"c"``.
        class_token: whether it compares tokens with the class token.
        mean: whether the policy divides the terms by the number of channels; directions are still summed.
        draws: whether it draws random numbers, from the policy's ``seed``.
        reads_output: whether it reads the output of the block, as the residual stream after it does, too.
        words: what it is, for the readers of a picture, in ASCII.
    """

    function: Callable[..., Tensor]
    needs: tuple[str, ...] = ()
    class_token: bool = False
    mean: bool = False
    draws: bool = False
    reads_output: bool = False
    words: str = ""


def delta(state: TokenState, evidence: Evidence) -> Tensor:
    """MTR: the timescale, Σ Δ over channels, divided by their number (arXiv 2507.14042)."""
    return evidence["delta"]


def state_update(state: TokenState, evidence: Evidence) -> Tensor:
    """``write``: the size of a token's update of the state: the Frobenius norm of (Δ⊙u) Bᵀ, which is ‖Δ⊙u‖·‖B‖."""
    return evidence["write"].sqrt() * evidence.projection("b").norm(dim=-1)


def output(state: TokenState, evidence: Evidence) -> Tensor:
    """HSA: Σ max(0, y) over channels, y the output of the scan before the gate (arXiv 2409.18962)."""
    return evidence["output"]


def hidden(state: TokenState, evidence: Evidence) -> Tensor:
    """UTR: Σ max(0, y) over channels, y the output of the block (arXiv 2410.14725)."""
    return state.hidden.float().clamp(min=0).sum(-1)[:, None]


def input_projection(state: TokenState, evidence: Evidence) -> Tensor:
    """``b``: the mean of the N entries of the input projection B, an ablation in MTR."""
    return evidence.projection("b").mean(-1)


def output_projection(state: TokenState, evidence: Evidence) -> Tensor:
    """``c``: the mean of the N entries of the output projection C, an ablation in MTR."""
    return evidence.projection("c").mean(-1)


def class_token(state: TokenState, evidence: Evidence) -> Tensor:
    """Cosine similarity of residual streams, of the token and the first class token, instead of EViT's attention."""
    anchor = state.special_tokens()[:, :1].float()
    return F.cosine_similarity(state.stream.float(), anchor, dim=-1)[:, None]


def norm(state: TokenState, evidence: Evidence) -> Tensor:
    """The Euclidean norm of the residual stream after the block."""
    return state.stream.float().norm(dim=-1)[:, None]


def magnitude(state: TokenState, evidence: Evidence) -> Tensor:
    """STORM's form of EViT: the mean of |x| over channels, x the stream that enters the block (arXiv 2606.19932)."""
    stream = state.hidden if state.residual is None else state.residual
    return stream.float().abs().mean(-1)[:, None]


def none(state: TokenState, evidence: Evidence) -> Tensor:
    """Zero, for policies that choose by similarity alone."""
    return torch.zeros_like(state.size)[:, None]


def random(state: TokenState, evidence: Evidence, seed: int) -> Tensor:
    """A pseudo-random number that depends on original position and seed alone: the same for every image and batch."""
    return pseudo_random(state.index, seed)[:, None]


def pseudo_random(number: Tensor, seed: int) -> Tensor:
    """float32 in [0, 1] from integers and a seed alone, the same on every device."""
    phase = seed * 78.233 % math.tau  # the constants are those of a common shader hash
    return torch.frac(torch.sin((number + 1).double() * 12.9898 + phase) * 43758.5453).abs().float()


SCORES = {
    "delta": Score(delta, ("delta",), mean=True, words="step size of the scan"),
    "write": Score(state_update, ("write", "b"), words="size of the update of the state"),
    "output": Score(output, ("output",), mean=True, words="output of the scan, if positive"),
    "hidden": Score(hidden, reads_output=True, words="output of the block, if positive"),
    "b": Score(input_projection, ("b",), words="mean of the input projection B"),
    "c": Score(output_projection, ("c",), words="mean of the output projection C"),
    "class_token": Score(class_token, class_token=True, reads_output=True, words="similarity to the class token"),
    "norm": Score(norm, reads_output=True, words="norm of the residual stream"),
    "magnitude": Score(magnitude, words="mean size of the channels"),
    "random": Score(random, draws=True, words="pseudo-random numbers"),
    "none": Score(none),
}
"""The scores by their names in ``mtr.score``. A minus in front of a name negates the score, as in ``-delta``."""
