"""Adapt weights to another grid of patches, number of frames or number of input channels."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mtr_lab.errors import UserError


def fit_positions(
    embedding: Tensor,
    stated: Sequence[int] | None,
    grid: tuple[int, int],
    class_position: Callable[[int], int],
    label: str,
) -> Tensor:
    """Position embeddings (1, 1 + patches, C) of a checkpoint on the grid of a model.

    Args:
        embedding: of the patches and the class token.
        stated: (rows, columns) of the checkpoint's grid; ``None`` for a square one.
        grid: (rows, columns) of the model.
        class_position: number of patches -> position of the class token.
        label: of the checkpoint, for errors.

    Raises:
        UserError: the number of patches is not that of the stated grid, or it is no square and no grid is stated.
    """
    patches = embedding.shape[1] - 1
    side = math.isqrt(patches)
    if stated and (len(stated) != 2 or stated[0] * stated[1] != patches):
        raise UserError(
            f"{label}: pos_embed has {patches} patches, not the {list(stated)} that are stated as its grid."
        )
    if not stated and side * side != patches:
        fits = grid[0] * grid[1] == patches
        example = f"[{grid[0]},{grid[1]}] if it is the model's" if fits else "[ROWS,COLUMNS]"
        raise UserError(
            f"{label}: pos_embed has {patches} patches, which is no square, and the file does not state its grid: give "
            f"checkpoint_grid={example} (backbone.checkpoint_grid=…)."
        )
    old = stated or (side, side)
    if tuple(old) == grid:
        return embedding
    old_position, new_position = class_position(patches), class_position(grid[0] * grid[1])
    return resize_positions(embedding.float(), old_position, (old[0], old[1]), new_position, grid)


def resize_positions(
    embedding: Tensor, class_position: int, old: tuple[int, int], new_class_position: int, new: tuple[int, int]
) -> Tensor:
    """Interpolate position embeddings to another grid, bicubic with antialiasing.

    Args:
        embedding: (1, 1 + old rows · columns, C); the entry of the class token, at ``class_position``, is copied.
        old, new: (rows, columns).
        new_class_position: position of the class token in the result.

    Returns:
        (1, 1 + new rows · columns, C).
    """
    class_entry = embedding[:, class_position : class_position + 1]
    patches = torch.cat([embedding[:, :class_position], embedding[:, class_position + 1 :]], dim=1)
    image = patches.float().unflatten(1, old).permute(0, 3, 1, 2)  # (1, C, old rows, old columns)
    image = F.interpolate(image, size=new, mode="bicubic", antialias=True)
    patches = image.flatten(2).transpose(1, 2).to(embedding.dtype)
    return torch.cat([patches[:, :new_class_position], class_entry, patches[:, new_class_position:]], dim=1)


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
