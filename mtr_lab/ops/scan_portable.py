"""The selective scan without a loop over tokens: for devices without a kernel, and for exported models.

The sequence is cut into chunks of ``STEPS`` tokens. Step t advances the states of all chunks at once, from zero, and
keeps the product of their decays; the states before the chunks obey the same recurrence, over 1 / ``STEPS`` as many
places. Up to ``UNROLLED`` of these are computed one after the other, more in the same way again. The number of
operations grows with the logarithm of the length, the work is linear in it, and each step touches the states of one
token a chunk, which a cache can hold.

States never overflow: they are multiplied by decays in [0, 1] and added, and no decay is divided by. To first order in
the unit roundoff ε, the error of a state h_t is at most::

    Σ_{s ≤ t} (z + (t - s) c + k) e^-z |x_s| ε,   z = Σ_{r = s+1 … t} Δ_r |A|   (x_s: what token s writes)

for exponentials that are exact to c - 1 roundings and k = 2 + ``UNROLLED`` + ``STEPS`` · (levels of chunks) further
roundings; a loop over tokens has k = 2 + t - s. Since z e^-z ≤ 1/e, the bound is finite for every Δ.

Shapes as in ``selective_scan``; internally the states are (G, B, chunks, N, E).
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mtr_lab.ops.scan_inputs import ScanInputs
from mtr_lab.ops.scan_reference import GapDecay, Runs, growth, selective_scan_reference

STEPS = 8
"""Tokens of a chunk."""
UNROLLED = 32
"""The most chunks that follow each other one by one."""


def selective_scan_portable(inputs: ScanInputs, stats: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The scan in plain PyTorch without a loop over tokens."""
    return selective_scan_reference(inputs, stats, run=_in_chunks)


def _in_chunks(
    delta: Tensor, write: Tensor, B: Tensor, C: Tensor, A: Tensor, gaps: GapDecay | None, runs: Runs | None
) -> Tensor:
    """The output (G, B, L, E) of the scan without skip and gate; the arguments are in reading order."""
    exponent = A.mT[:, None, None]  # (G, 1, 1, N, E)
    inputs = [_steps(x) for x in (delta, write, C)]  # STEPS times (G, B, chunks, 1, E or N)
    inputs.append(_steps(B, column=True))  # (G, B, chunks, N, 1)
    if gaps is not None:
        inputs.append(_steps(gaps.gap[..., None]))  # (G, B, chunks, 1, 1)
    if runs is not None:
        inputs += [_steps(x) for x in runs]  # (G, B, chunks, 1, E)

    def decays_and_updates() -> Iterator[tuple[Tensor, Tensor]]:
        for delta_t, write_t, _, B_t, *others in zip(*inputs, strict=True):
            logarithm, update = delta_t * exponent, write_t * B_t
            if gaps is not None:
                logarithm = logarithm + others.pop(0) * gaps.exponent.mT[:, None, None]
            if runs is not None:
                update = update * growth(others[0] * exponent, others[1])
            yield torch.exp(logarithm), update

    states = _recurrence(decays_and_updates())
    y = torch.cat([C_t @ state for C_t, state in zip(inputs[2], states, strict=True)], dim=3)
    return y.flatten(2, 3)[:, :, : delta.shape[2]]


def _steps(x: Tensor, *, column: bool = False) -> Sequence[Tensor]:
    """(G, B, L, *) -> the tokens of each step in all chunks, (G, B, chunks, 1, *), or as a ``column`` (…, *, 1)."""
    length, steps = x.shape[2], min(STEPS, x.shape[2])
    chunks = -(-length // steps)
    padding = [0, 0] * (x.ndim - 3) + [0, chunks * steps - length]
    cut = F.pad(x, padding).unflatten(2, (chunks, steps)) if padding[-1] else x.unflatten(2, (chunks, steps))
    return cut.mT.split(1, dim=4) if column else cut.split(1, dim=3)


def _recurrence(steps: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """h = decay · h + update in every chunk, and on from chunk to chunk; (G, B, chunks, N, E) for each step."""
    states: list[Tensor] = []
    totals: list[Tensor] = []
    for decay, update in steps:
        states.append(decay * states[-1] + update if states else update)
        totals.append(totals[-1] * decay if totals else decay)
    if states[-1].shape[2] == 1:
        return states
    before = _before(totals[-1], states[-1])
    return [state + total * before for state, total in zip(states, totals, strict=True)]


def _before(decay: Tensor, update: Tensor) -> Tensor:
    """The state before each chunk, given what all its tokens do to a state: ``decay`` and ``update``."""
    chunks = update.shape[2] - 1  # nothing comes after the last one
    if chunks <= UNROLLED:
        states: list[Tensor] = []
        for decay_c, update_c in zip(*(x[:, :, :-1].split(1, dim=2) for x in (decay, update)), strict=True):
            states.append(decay_c * states[-1] + update_c if states else update_c)
        return F.pad(torch.cat(states, dim=2), (0, 0, 0, 0, 1, 0))
    pairs = [[t.squeeze(3) for t in _steps(x[:, :, :-1])] for x in (decay, update)]
    inner = torch.stack(_recurrence(zip(*pairs, strict=True)), dim=3).flatten(2, 3)[:, :, :chunks]
    return F.pad(inner, (0, 0, 0, 0, 1, 0))
