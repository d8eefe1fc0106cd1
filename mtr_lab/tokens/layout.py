"""The layout of an unreduced token sequence: patches of a grid, with special tokens among them."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The unreduced tokens of one stage, frame by frame and row by row, with special tokens at fixed positions.

    Args:
        rows, columns: patches of one sequence, that is of one window if the stage cuts the image into windows.
        special: positions of the special tokens in the sequence, ascending.
        frames: of a video.
        windows: (down, across), the windows of an image. Each is a sequence; the sequences of an image follow each
            other in the batch, row by row.
        padding: (rows, columns) of the last windows that are outside the image, below it and on its right. They are
            tokens like others, but no part of the image's maps.
    """

    rows: int
    columns: int
    special: tuple[int, ...] = ()
    frames: int = 1
    windows: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if list(self.special) != sorted(set(self.special)):
            raise ValueError(f"positions of special tokens have to ascend, got {self.special}")

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of one frame of one sequence."""
        return self.rows, self.columns

    @property
    def axes(self) -> tuple[int, ...]:
        """The sizes of frames, rows and columns of one sequence, without axes of size 1."""
        return tuple(size for size in (self.frames, self.rows, self.columns) if size > 1) or (1,)

    @property
    def image_grid(self) -> tuple[int, int]:
        """(rows, columns) of one frame of the image, all windows without their padding."""
        return self.rows * self.windows[0] - self.padding[0], self.columns * self.windows[1] - self.padding[1]

    @property
    def patches(self) -> int:
        """The number of patches of one sequence."""
        return self.frames * self.rows * self.columns

    @property
    def tokens(self) -> int:
        """The number of tokens of one sequence, special ones included."""
        return self.patches + len(self.special)

    @property
    def sequences(self) -> int:
        """The number of sequences of one image."""
        return self.windows[0] * self.windows[1]

    def resized(self, rows: int, columns: int) -> "Layout":
        """The layout of another grid; special tokens stand behind the same share of the patches, rounded down."""
        patches = self.frames * rows * columns
        special = ((place - before) * patches // self.patches + before for before, place in enumerate(self.special))
        return replace(self, rows=rows, columns=columns, special=tuple(special))

    @property
    def sampled(self) -> "Layout":
        """The layout of one of each 2 x 2 patches, those of even rows and columns."""
        return self.resized((self.rows + 1) // 2, (self.columns + 1) // 2)

    def patch_positions(self, device: torch.device) -> Tensor:
        """(patches,) int64, the position of each patch in the sequence; computed on the device, for CUDA graphs."""
        patch = torch.arange(self.patches, device=device)
        position = patch
        for before, special in enumerate(self.special):
            position = position + (patch >= special - before)
        return position

    def join(self, maps: Tensor) -> Tensor:
        """Maps of sequences (B · sequences, C, rows, columns) to those of images (B, C, height, width) in patches."""
        down, across = self.windows
        if self.sequences > 1:
            split = maps.unflatten(0, (-1, down, across))  # (B, down, across, C, rows, columns)
            maps = split.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        height, width = self.image_grid
        return maps[..., :height, :width] if any(self.padding) else maps

    def cut(self, maps: Tensor) -> Tensor:
        """The inverse of ``join``: maps of images to those of their sequences, with zeros as padding."""
        down, across = self.windows
        if any(self.padding):
            maps = F.pad(maps, (0, self.padding[1], 0, self.padding[0]))
        if self.sequences == 1:
            return maps
        split = maps.unflatten(3, (across, self.columns)).unflatten(2, (down, self.rows))  # (B, C, down, r, across, c)
        return split.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
