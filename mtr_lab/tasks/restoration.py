"""Maps for dense tasks: every original patch gets a value again, wherever its token has gone.

Three ways to fill the place of a token that was merged or dropped:

* ``nearest``: the value of the token that absorbed it; of a dropped one, that of the nearest surviving token.
* ``skip``: the value it had itself when it was removed.
* ``interpolation``: the mean of the four nearest surviving tokens, weighted by the inverse of their squared distance.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mtr_lab.backbones import TokenState, VisionMamba
from mtr_lab.errors import unknown

RESTORATIONS = ("nearest", "skip", "interpolation")
_NEIGHBOURS = 4


def check_restoration(name: str) -> None:
    """Raise a ``UserError`` unless it is one of ``RESTORATIONS``."""
    if name not in RESTORATIONS:
        raise unknown("restoration", name, RESTORATIONS)


def restore(
    state: TokenState,
    values: Tensor,
    grid: tuple[int, int],
    class_position: int,
    restoration: str = "nearest",
    removed: Tensor | None = None,
) -> Tensor:
    """A map of all patches from the values of the tokens that are left; the class token has no part in it.

    Exact where nothing was removed, and differentiable in ``values`` and ``removed``.

    Args:
        state: settled; traced for ``nearest``.
        values: (B, L, C) of its tokens.
        grid: rows and columns of the patches.
        class_position: of the class token among the L0 = rows · columns + 1 original tokens.
        restoration: one of ``RESTORATIONS``.
        removed: for ``skip``, (B, L0, C), at the place of each removed token its last value of its own.

    Returns:
        (B, C, rows, columns).

    Raises:
        UserError: another restoration.
    """
    check_restoration(restoration)
    if restoration == "skip":
        assert removed is not None
        restored = scatter_tokens(removed, state.index, values)
    elif restoration == "interpolation":
        restored = torch.stack(
            [
                _interpolate(each, index, special, grid, class_position)
                for each, index, special in zip(values, state.index, state.special, strict=True)
            ]
        )
    else:
        assert state.source is not None
        source = state.source
        if bool((source < 0).any()):
            nearest = [_nearest(*each, grid, class_position) for each in zip(state.index, state.special, strict=True)]
            source = torch.where(source < 0, torch.stack(nearest), source)
        restored = values.gather(1, source[..., None].expand(-1, -1, values.shape[-1]))
    patches = torch.cat([restored[:, :class_position], restored[:, class_position + 1 :]], dim=1)
    return patches.transpose(1, 2).unflatten(2, grid)


def scatter_tokens(onto: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """``onto`` (B, L0, C) with the values (B, L, C) of tokens at their original positions ``index`` (B, L)."""
    return onto.scatter(1, index[..., None].expand(-1, -1, values.shape[-1]), values)


def feature_maps(
    model: VisionMamba, images: Tensor, depths: Sequence[int], restoration: str = "nearest"
) -> list[Tensor]:
    """The residual stream after some of the blocks, on the grid of the patches; of a patched model, restored.

    Args:
        model: for images.
        images: (B, channels, H, W).
        depths: after how many blocks, ascending, from 1.
        restoration: one of ``RESTORATIONS``.

    Returns:
        for each depth (B, C, rows, columns) in float32.
    """
    check_restoration(restoration)
    grid = model.patch_embed.grid(*images.shape[-2:])
    place = model.class_position(grid[0] * grid[1])
    state = model.embed(images, traced=True)
    removed = state.stream if restoration == "skip" else None
    maps = []
    for depth, block in enumerate(model.blocks[: depths[-1]], start=1):
        index = state.index
        state = block(state)
        if removed is not None and state.plan is not None:  # until it is carried out, all tokens are still there
            removed = scatter_tokens(removed, index, replace(state, plan=None).stream)
        if depth in depths:
            state = state.settled()
            maps.append(restore(state, state.stream, grid, place, restoration, removed))
    return maps


def _squared_distances(
    index: Tensor, special: Tensor, grid: tuple[int, int], class_position: int
) -> Tensor:
    """(L0, L) between all original positions and the tokens (L,) left of one image, infinite to special tokens.

    The class token's own row is meaningless.
    """
    position = torch.arange(grid[0] * grid[1] + 1, device=index.device)
    patch = (position - (position > class_position).long()).clamp(max=grid[0] * grid[1] - 1)
    places = torch.stack([patch // grid[1], patch % grid[1]], dim=1).float()
    differences = places[:, None] - places[index][None]
    return differences.square().sum(-1).index_fill(1, special, torch.inf)


def _nearest(index: Tensor, special: Tensor, grid: tuple[int, int], class_position: int) -> Tensor:
    """(L0,) the nearest of the tokens left of one image, the class token excepted."""
    return _squared_distances(index, special, grid, class_position).argmin(dim=1)


def _interpolate(
    values: Tensor, index: Tensor, special: Tensor, grid: tuple[int, int], class_position: int
) -> Tensor:
    """(L0, C) of one image's tokens (L, C)."""
    squares = _squared_distances(index, special, grid, class_position)
    nearest, tokens = squares.topk(min(_NEIGHBOURS, len(index) - len(special)), dim=1, largest=False)
    inverse = 1 / nearest.clamp(min=1)  # distances of different places are at least 1
    weights = torch.where(nearest[:, :1] == 0, (nearest == 0).float(), inverse)
    weights = (weights / weights.sum(1, keepdim=True)).to(values.dtype)
    return (weights[..., None] * values[tokens]).sum(1)
