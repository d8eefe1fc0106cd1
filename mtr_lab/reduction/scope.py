"""``mtr.scope``: among which tokens of a video those to remove are chosen."""

import torch
from torch import Tensor

from mtr_lab.tokens import TokenState

CLIP, FRAME = "clip", "frame"
SCOPES = (CLIP, FRAME)
"""``clip``: the tokens of all frames compete. ``frame``: those of each frame do, by their ranks in it, so that all
frames lose equally many, to one, as long as no frame runs out of them."""


def ranks_in_frames(values: Tensor, state: TokenState, tokens: Tensor | None = None) -> Tensor:
    """The rank of each value among those of its frame, from 0 for the lowest; of equals the earlier is lower.

    Args:
        values: (B, A), NaN comes last.
        state: of the L tokens; without a layout they are of one frame.
        tokens: (B, A), which tokens the values are of; ``None``: all, A = L. Special tokens are in no frame.

    Returns:
        (B, A) float32.
    """
    order = values.argsort(dim=1, stable=True)
    frames = _frames(state) if tokens is None else _frames(state).gather(1, tokens)
    by_frame = frames.gather(1, order).argsort(dim=1, stable=True)
    order = order.gather(1, by_frame)
    sorted_frames = frames.gather(1, order)
    place = torch.arange(values.shape[1], device=values.device).expand_as(order)
    starts = torch.cat([torch.ones_like(order[:, :1], dtype=torch.bool), sorted_frames.diff(dim=1) != 0], dim=1)
    first = torch.where(starts, place, 0).cummax(dim=1).values
    return torch.zeros_like(values, dtype=torch.float32).scatter(1, order, (place - first).float())


def _frames(state: TokenState) -> Tensor:
    """The number of the frame of each token, -1 of a special one: (B, L) int64."""
    layout = state.layout
    if layout is None:
        return torch.zeros_like(state.index)
    frame_of = torch.full((layout.tokens,), -1, dtype=torch.int64, device=state.index.device)
    patches = torch.arange(layout.patches, device=state.index.device) // (layout.rows * layout.columns)
    frame_of = frame_of.scatter(0, layout.patch_positions(state.index.device), patches)
    return frame_of[state.index]
