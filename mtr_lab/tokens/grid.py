"""Restore the grid of patches from a reduced sequence, and convolve over the grid."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mtr_lab import ops
from mtr_lab.errors import unknown
from mtr_lab.tokens.gather import take, take_or_zero
from mtr_lab.tokens.layout import Layout
from mtr_lab.tokens.pooling import ordinary_tokens
from mtr_lab.tokens.state import TokenState

RESTORATIONS = ("nearest", "skip", "interpolate")
"""``nearest``: a position takes the token that absorbed it; a dropped one takes the nearest survivor. ``skip``: a
position takes its own last features plus what the token that absorbed it has gained since; a dropped one gains nothing.
``interpolate``: a position without a token takes the mean of the nearest survivors, weighted by 1/distance². Of equally
near survivors the one that stands first in the sequence counts as nearer."""
_NEIGHBOURS = 4  # survivors that an interpolated position averages


def check_restoration(how: str) -> None:
    """Raise a ``UserError`` unless ``how`` is one of ``RESTORATIONS``."""
    if how not in RESTORATIONS:
        raise unknown("restoration", how, RESTORATIONS)


def restore(state: TokenState, grid: tuple[int, int], how: str = "nearest") -> Tensor:
    """The residual stream on the grid of patches; exact for a sequence that was not reduced.

    Args:
        state: of images; traced if it is reduced. M tokens, S of them special, which are not on the grid.
        grid: (rows, columns) of patches; L0 = rows · columns + S.
        how: one of ``RESTORATIONS``.

    Returns:
        (B, C, rows, columns), differentiable with respect to the streams.

    Raises:
        UserError: an unknown restoration.
        ValueError: the state is reduced and not traced, or ``skip`` is asked of one that does not track the offset.
    """
    check_restoration(how)
    state = state.applied()
    if state.source is None and state.index.shape[1] == grid[0] * grid[1] + state.special.shape[1]:
        state = state._replace(source=state.index)  # nothing was reduced
    if state.source is None or (how == "skip" and state.offset is None):
        raise ValueError("expected a traced state, one that tracks its offset for the restoration 'skip'")
    patches = ordinary_tokens(state.index.gather(1, state.special), state.source.shape[1])  # original positions, (B, P)
    if how == "skip":
        assert state.offset is not None
        tokens = take(take_or_zero(state.stream, state.source) + state.offset, patches)
    elif how == "interpolate":
        tokens = _interpolate(state, patches, grid)
    else:
        tokens = _unmerged(state.stream, state, patches, grid)
    return tokens.transpose(1, 2).unflatten(2, grid)


def fit_grid(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps (B, C, *) on the grid of (rows, columns), bilinear; unchanged if they are on it.

    A policy may give the backbone a smaller picture, whose maps have a coarser grid than those of the full one.
    """
    return maps if tuple(maps.shape[-2:]) == grid else F.interpolate(maps, grid, mode="bilinear")


def convolve(values: Tensor, state: TokenState, conv: Callable[[Tensor], Tensor]) -> Tensor:
    """A convolution over the grid of patches: computed at all positions, read at the survivors.

    A position takes the value of the token that absorbed it; a dropped one that of the nearest survivor.

    Args:
        values: (B, L, C), one row for each token of ``state``.
        state: traced if it is reduced, with its layout, without special tokens. On a full grid that a reduction has
            left, the convolution is over that grid.
        conv: maps (B, C, rows, columns) -> (B, C', rows, columns), of the size of the grid.

    Returns:
        (B, L, C').
    """
    whole = state.current_layout
    layout = whole or state.layout
    assert layout is not None
    assert not layout.special
    if whole is None:
        patches = torch.arange(layout.patches, device=values.device).expand(values.shape[0], -1)
        values = _unmerged(values, state, patches, layout.grid)
    maps = conv(values.transpose(1, 2).unflatten(2, layout.grid)).flatten(2).transpose(1, 2)
    return maps if whole else take(maps, state.index)


def sample(values: Tensor, layout: Layout) -> Tensor:
    """One of each 2 x 2 tokens of a full grid, that of the even row and column: (B, L, C) -> (B, L', C)."""
    grids = values.unflatten(1, (layout.frames, *layout.grid))
    return grids[:, :, ::2, ::2].flatten(1, 3)


def spread(values: Tensor, layout: Layout) -> Tensor:
    """The inverse of ``sample``: every token of a full grid takes the value of its 2 x 2, (B, L', C) -> (B, L, C)."""
    rows, columns = layout.grid
    grids = values.unflatten(1, (layout.frames, *layout.sampled.grid))
    grids = grids.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return grids[:, :, :rows, :columns].flatten(1, 3)


def containing(state: TokenState) -> Tensor:
    """The token that contains each original position, (B, L0); the nearest survivor, if the position was dropped.

    Args:
        state: traced, with its layout, without special tokens.
    """
    assert state.source is not None
    assert state.layout is not None
    patches = torch.arange(state.source.shape[1], device=state.source.device).expand_as(state.source)
    return _containing(state, patches, state.layout.grid)


def _containing(state: TokenState, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """As ``containing``, of the original positions ``patches`` (B, P)."""
    assert state.source is not None
    source = state.source.gather(1, patches)
    if _may_drop(state, source):
        _, neighbour = _neighbours(state, patches, grid, 1)
        source = torch.where(source < 0, neighbour[..., 0], source)
    return source


def _unmerged(values: Tensor, state: TokenState, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Values (B, M, C) of the tokens, put back at the original positions ``patches`` (B, P): (B, P, C)."""
    return take(values, _containing(state, patches, grid))


def _may_drop(state: TokenState, source: Tensor) -> bool:
    """Whether tokens may have been dropped. Reads the data only where this does not wait for a device."""
    fewer = state.index.shape[1] < source.shape[1] + state.special.shape[1]
    return fewer and (not ops.is_readable(source) or bool((source < 0).any()))


def _interpolate(state: TokenState, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, P, C): survivors at their own positions, weighted means of the nearest survivors elsewhere."""
    count = min(_NEIGHBOURS, state.index.shape[1] - state.special.shape[1])
    distance, neighbour = _neighbours(state, patches, grid, count)  # (B, P, count)
    weight = distance.clamp(min=1e-6) ** -2
    weight = torch.where(distance[..., :1] == 0, (distance == 0).to(weight.dtype), weight)
    weight = weight / weight.sum(-1, keepdim=True)
    tokens = torch.zeros((), device=weight.device)
    for k in range(count):  # one neighbour at a time: all at once would take (B, P, count, C)
        tokens = tokens + weight[..., k, None] * take(state.stream, neighbour[..., k])
    return tokens


def _neighbours(state: TokenState, patches: Tensor, grid: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    """The nearest survivors of each patch by distance on the grid: distances and tokens, (B, P, count) each.

    Squared distances are whole numbers. Times the number of tokens, plus the token, they have an order without ties,
    which is the same on every device and in exported files. They are sums of a term of the row and one of the column.
    """
    assert state.source is not None
    number = torch.arange(patches.shape[1], device=patches.device).expand_as(patches)
    patch = torch.zeros_like(state.source).scatter(1, patches, number).gather(1, state.index)  # of each token, (B, M)
    rows, columns, tokens = patches.shape[1] // grid[1], grid[1], state.index.shape[1]
    patch = patch.scatter(1, state.special, 2 * (rows + columns) * columns)  # far below the grid

    def along(length: int, coordinate: Tensor) -> Tensor:  # (B, length, M)
        return (torch.arange(length, device=patches.device)[:, None] - coordinate[:, None]).square() * tokens

    by_column = along(columns, patch % columns) + torch.arange(tokens, device=patches.device)
    key = (along(rows, patch // columns)[:, :, None] + by_column[:, None]).flatten(1, 2)  # (B, P, M)
    key = key.amin(2, keepdim=True) if count == 1 else key.topk(count, largest=False).values
    return (key // tokens).float().sqrt(), key % tokens
