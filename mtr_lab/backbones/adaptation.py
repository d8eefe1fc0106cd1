"""Adapt weights to another grid of patches, number of frames or number of input channels."""

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mtr_lab.errors import UserError


def fit_positions(
    embedding: Tensor,
    stated: Sequence[int] | None,
    grid: tuple[int, int],
    special: Callable[[int], Sequence[int]],
    label: str,
    *,
    antialias: bool = True,
) -> Tensor:
    """Position embeddings (1, patches + S, C) of a checkpoint on the grid of a model.

    Args:
        embedding: of the patches and S special tokens, such as the class token.
        stated: (rows, columns) of the checkpoint's grid; ``None`` for a square one if possible, else the model's.
        grid: (rows, columns) of the model.
        special: number of patches -> the entries of the special tokens, none if they have no entry.
        label: of the checkpoint, for errors.
        antialias: see ``resize_positions``.

    Raises:
        UserError: the number of patches fits no grid or no image, or the embeddings look like those of the turned grid.
    """
    patches = embedding.shape[1] - len(special(0))
    if patches > _MOST:
        raise UserError(f"{label}: pos_embed has {patches} patches, more than any image has: expected at most {_MOST}.")
    side = math.isqrt(patches)
    if stated and (len(stated) != 2 or stated[0] * stated[1] != patches):
        raise UserError(f"{label}: pos_embed has {patches} patches, not the {list(stated)} of the stated grid.")
    if not stated and side * side != patches:
        _check_own(_split(embedding, special(patches))[1][0], grid, label)
    old = stated or ((side, side) if side * side == patches else grid)
    if tuple(old) == grid:
        return embedding
    return resize_positions(embedding.float(), special, (old[0], old[1]), grid, antialias=antialias)


_MOST = 2**20
"""Patches of an image of 16 384 x 16 384 pixels."""


def _check_own(patches: Tensor, grid: tuple[int, int], label: str) -> None:
    """Raise a ``UserError`` unless embeddings (patches, C) of an unstated grid may be those of (rows, columns).

    In a trained model neighbours differ least. If the patches a row apart differ more than they would on the turned
    grid, rows and columns are probably confused; if they differ about as much, a warning says that nothing tells.
    """
    rows, columns = grid
    if rows * columns != len(patches):
        doubt, advice = "is neither a square nor the model's number", "[ROWS,COLUMNS]"
    else:
        own, turned = _roughness(patches, columns), _roughness(patches, rows)
        if min(grid) == 1 or own * _CLEAR <= turned:
            return
        if own <= turned * _CLEAR:
            warnings.warn(
                f"{label} does not state its grid, and pos_embed does not tell {rows} x {columns} patches from "
                f"{columns} x {rows}: it is taken as {rows} x {columns}. If it is not, give "
                f"checkpoint_grid=[{columns},{rows}] (backbone.checkpoint_grid=[{columns},{rows}]).",
                stacklevel=8,
            )
            return
        doubt, advice = f"look like {columns} x {rows} ones, not {rows} x {columns}", f"[{columns},{rows}]"
    raise UserError(
        f"{label}: pos_embed has {len(patches)} patches, which {doubt}, and the file does not state its grid: give "
        f"checkpoint_grid={advice} (backbone.checkpoint_grid={advice})."
    )


_CLEAR = 1.25
"""The ratio from which two roughnesses differ clearly."""


def _roughness(patches: Tensor, columns: int) -> float:
    """The mean squared difference of patches a row apart."""
    return float((patches[columns:] - patches[:-columns]).float().square().mean())


def resize_positions(
    embedding: Tensor,
    special: Callable[[int], Sequence[int]],
    old: tuple[int, int],
    new: tuple[int, int],
    *,
    antialias: bool = True,
) -> Tensor:
    """Interpolate position embeddings to another grid, bicubic.

    Args:
        embedding: (1, S + old rows · columns, C); the entries of the S special tokens are copied.
        special: number of patches -> the entries of the special tokens, ascending.
        old, new: (rows, columns).
        antialias: for a smaller grid, average over all embeddings that are left out.

    Returns:
        (1, S + new rows · columns, C).
    """
    copied, patches = _split(embedding, special(old[0] * old[1]))
    image = patches.float().unflatten(1, old).permute(0, 3, 1, 2)  # (1, C, old rows, old columns)
    image = F.interpolate(image, size=new, mode="bicubic", antialias=antialias)
    resized = image.flatten(2).transpose(1, 2).to(embedding.dtype)
    for position, entry in zip(special(new[0] * new[1]), copied, strict=True):
        resized = torch.cat([resized[:, :position], entry, resized[:, position:]], dim=1)
    return resized


def _split(embedding: Tensor, special: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Position embeddings (1, S + patches, C) -> that of each special token, and those of the patches together."""
    bounds = [-1, *special, embedding.shape[1]]
    patches = torch.cat([embedding[:, before + 1 : after] for before, after in pairwise(bounds)], dim=1)
    return [embedding[:, position : position + 1] for position in special], patches


def resize_frames(embedding: Tensor, frames: int) -> Tensor:
    """Interpolate temporal position embeddings (1, T, C) linearly to another number of frames."""
    return F.interpolate(embedding.float().transpose(1, 2), size=frames, mode="linear").transpose(1, 2)


def resize_channels(weight: Tensor, channels: int) -> Tensor:
    """Weights (C, in_chans, \\*) of a patch convolution for another number of channels: (C, channels, \\*).

    One channel gets the sum of the weights, so that a grey image gives the same tokens as three equal channels; more
    channels repeat the weights in turn, scaled to keep that sum. As ``timm.models.adapt_input_conv``.
    """
    old = weight.shape[1]
    if channels == 1:
        return weight.float().sum(1, keepdim=True)
    return weight.float()[:, [channel % old for channel in range(channels)]] * (old / channels)
