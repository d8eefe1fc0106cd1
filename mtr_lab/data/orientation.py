"""EXIF orientation of pictures whose annotations state the size of the picture that they were made on."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtr_lab.errors import UserError

UPRIGHT = 1
_INVERSE = {6: 8, 8: 6}
_SWAPPING = (5, 6, 7, 8)
"""Orientations that exchange height and width."""


@dataclass(frozen=True)
class Orientation:
    """How the pixels of a picture lie.

    Args:
        tag: its EXIF orientation, 1 to 8; see table 6 of the EXIF standard.
        applied: whether the pixels were turned upright.
    """

    tag: int
    applied: bool

    def turn(self, annotated: tuple[int, int] | None, size: tuple[int, int], name: str) -> int:
        """The orientation by which annotations are turned so that they fit the pixels; 1: they fit.

        Args:
            annotated: (height, width) of the picture that the annotations were made on; ``None``: unknown, they fit.
            size: (height, width) of the pixels.
            name: of the picture and of what states the size, for the message.

        Raises:
            UserError: ``annotated`` is neither the size of the upright nor of the stored picture.
        """
        if annotated is None or annotated == size:
            return UPRIGHT
        if self.tag in _SWAPPING and annotated == size[::-1]:
            return self.tag if self.applied else _INVERSE.get(self.tag, self.tag)
        (height, width), (rows, columns) = annotated, size
        raise UserError(
            f"{name} states {width} x {height} pixels, the image has {columns} x {rows}: expected the same. Correct "
            "the annotation, or resize one of them."
        )


def before(turn: int, size: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) of what has this size after a turn."""
    return size[::-1] if turn in _SWAPPING else size


def turned(array: np.ndarray, turn: int) -> np.ndarray:
    """Pixels (*, h, w), turned as a viewer turns a picture of this orientation."""
    if turn in _SWAPPING:
        array = array.swapaxes(-1, -2)
    if turn in (2, 3, 6, 7):
        array = array[..., ::-1]
    if turn in (3, 4, 7, 8):
        array = array[..., ::-1, :]
    return np.ascontiguousarray(array)


def turned_boxes(boxes: Tensor, turn: int, size: tuple[int, int]) -> Tensor:
    """Boxes (n, 4) (left, top, right, bottom), turned likewise; ``size`` is the (height, width) after the turn."""
    height, width = size
    left, top, right, bottom = boxes.unbind(1)
    if turn in _SWAPPING:
        left, top, right, bottom = top, left, bottom, right
    if turn in (2, 3, 6, 7):
        left, right = width - right, width - left
    if turn in (3, 4, 7, 8):
        top, bottom = height - bottom, height - top
    return torch.stack([left, top, right, bottom], 1)
