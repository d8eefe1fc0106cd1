"""Maps over patches in pixels: regions of merged tokens, their mean colours and borders."""

from dataclasses import dataclass

import numpy as np

DROPPED = -1
"""Value in a map of tokens: the patch's token was dropped."""


@dataclass(frozen=True)
class PatchGrid:
    """A grid of ``rows`` × ``columns`` patches, ``patch_size`` pixels wide, one every ``stride`` pixels.

    A pixel belongs to the patch with the nearest centre, so that overlapping patches tile the image, too.
    """

    rows: int
    columns: int
    patch_size: int
    stride: int

    def paint(self, values: np.ndarray, scale: int = 1) -> np.ndarray:
        """A map over patches, drawn in pixels and enlarged: (rows, columns, *) -> (scale·H, scale·W, *).

        H and W are the extent of the grid, which is the image's size for images that the model accepts.
        """
        row, column = (self._nearest(count, scale) for count in (self.rows, self.columns))
        return values[row[:, None], column]

    def _nearest(self, count: int, scale: int) -> np.ndarray:
        """The patch of each pixel along one axis."""
        pixels = ((count - 1) * self.stride + self.patch_size) * scale
        centres = (np.arange(pixels) + 0.5) / scale
        return np.floor((centres - (self.patch_size - self.stride) / 2) / self.stride).astype(int).clip(0, count - 1)


def region_sizes(tokens: np.ndarray) -> np.ndarray:
    """For every patch (or pixel), the number of patches with the same token: (*) int -> (*); 0 for ``DROPPED``."""
    sizes = np.bincount(tokens[tokens != DROPPED], minlength=1)
    return np.where(tokens == DROPPED, 0, sizes[tokens.clip(min=0)])


def mean_colours(image: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Every pixel gets the mean colour of its token's region: (*, 3) and (*) -> (*, 3) float.

    A region of a video may span frames. Dropped pixels keep their colour.
    """
    kept = tokens != DROPPED
    labels, count = tokens[kept], int(tokens.max()) + 1
    sums = np.stack([np.bincount(labels, image[kept][:, c], count) for c in range(3)], axis=-1)
    colours = image.astype(float)
    colours[kept] = (sums / np.bincount(labels, minlength=count).clip(min=1)[:, None])[labels]
    return colours


def region_borders(tokens: np.ndarray, merged: np.ndarray) -> np.ndarray:
    """The pixels on both sides of the borders of merged regions, (H, W) bool.

    A border separates neighbouring pixels of different tokens, at least one of which is ``merged`` (H, W). The edge of
    the image is not a border.
    """
    border = np.zeros(tokens.shape, dtype=bool)
    for one, other in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        between = (tokens[one] != tokens[other]) & (merged[one] | merged[other])
        border[one] |= between
        border[other] |= between
    return border
