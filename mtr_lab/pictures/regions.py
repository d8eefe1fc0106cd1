"""Which pixels belong to which patch, and what a map of tokens looks like in pixels."""

from dataclasses import dataclass

import numpy as np

DROPPED = -1
"""In a map of tokens, a patch that no token stands for any more."""


@dataclass(frozen=True)
class PatchGrid:
    """The patches of an image: ``rows`` × ``columns`` of them, ``patch_size`` pixels wide, one every ``stride`` pixels.

    A pixel belongs to the patch whose centre is nearest, so that overlapping patches tile the image too.
    """

    rows: int
    columns: int
    patch_size: int
    stride: int

    def paint(self, values: np.ndarray, scale: int = 1) -> np.ndarray:
        """A map over the patches in pixels, each ``scale`` times as wide: (rows, columns, *) -> (scale·H, scale·W, *).

        H and W are the extent of the patches, which for images that the model takes is the image.
        """
        row, column = (self._nearest(count, scale) for count in (self.rows, self.columns))
        return values[row[:, None], column]

    def _nearest(self, count: int, scale: int) -> np.ndarray:
        """The patch of each pixel along one axis."""
        pixels = ((count - 1) * self.stride + self.patch_size) * scale
        centres = (np.arange(pixels) + 0.5) / scale
        return np.floor((centres - (self.patch_size - self.stride) / 2) / self.stride).astype(int).clip(0, count - 1)


def region_sizes(tokens: np.ndarray) -> np.ndarray:
    """How many patches (pixels) share the token of each: (*) int, ``DROPPED`` where there is none -> (*).

    Dropped ones count 0.
    """
    sizes = np.bincount(tokens[tokens != DROPPED], minlength=1)
    return np.where(tokens == DROPPED, 0, sizes[tokens.clip(min=0)])


def mean_colours(image: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The mean colour of each token's region at all its pixels: (*, 3) and (*) -> (*, 3) float.

    A region of a video may span frames. Dropped pixels keep their own colour.
    """
    kept = tokens != DROPPED
    labels, count = tokens[kept], int(tokens.max()) + 1
    sums = np.stack([np.bincount(labels, image[kept][:, c], count) for c in range(3)], axis=-1)
    colours = image.astype(float)
    colours[kept] = (sums / np.bincount(labels, minlength=count).clip(min=1)[:, None])[labels]
    return colours


def region_borders(tokens: np.ndarray, merged: np.ndarray) -> np.ndarray:
    """The pixels on either side of a border of a merged region, (H, W) bool.

    A border runs between two pixels of different tokens, ``merged`` (H, W) for at least one of the two; there is none
    along the edge of the image, nor between two tokens of one patch each.
    """
    border = np.zeros(tokens.shape, dtype=bool)
    for one, other in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        between = (tokens[one] != tokens[other]) & (merged[one] | merged[other])
        border[one] |= between
        border[other] |= between
    return border
