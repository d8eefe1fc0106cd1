"""The annotated objects of an image, and the interface of sources of such images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mtr_lab.data.annotated import AnnotatedSource
from mtr_lab.errors import UserError

_MOST = 2**24
"""Largest edge of a box; float32 holds whole numbers up to it."""


@dataclass(frozen=True)
class Objects:
    """The n objects of one image."""

    boxes: np.ndarray
    """(n, 4) float32: left, top, right, bottom, in pixels from the image's top left corner."""
    labels: np.ndarray
    """(n,) int64, classes from 0."""
    ignore: np.ndarray
    """(n,) bool: crowds (COCO) and difficult objects (VOC), which neither training nor evaluation counts."""
    segmentations: tuple[Any, ...] | None = None
    """COCO's polygons or run lengths; None if the source has boxes only."""
    size: tuple[int, int] | None = None
    """(height, width) of the image as the annotation states it; None if it does not."""

    @classmethod
    def of(
        cls,
        rows: Sequence[tuple[Sequence[float], int, bool]],
        segmentations: Sequence[Any] | None = None,
        size: tuple[int, int] | None = None,
    ) -> "Objects":
        """From (box, class, ignore) of each object."""
        return cls(
            np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
            np.array([row[1] for row in rows], np.int64),
            np.array([row[2] for row in rows], bool),
            None if segmentations is None else tuple(segmentations),
            size,
        )


class ObjectSource(AnnotatedSource, Protocol):
    """Images with objects; the constructor checks all annotations.

    ``degenerate`` is the number of boxes without area, which are left out.
    """

    degenerate: int

    def objects(self, index: int) -> Objects: ...


def check_box(box: Sequence[float], name: str) -> bool:
    """Whether a box has an area.

    Raises:
        UserError: its edges are not numbers in order, or too large for float32; ``name`` names the box.
    """
    left, top, right, bottom = box
    if not all(abs(edge) <= _MOST for edge in box) or right < left or bottom < top:
        raise UserError(
            f"{name}: the box left {left:g}, top {top:g}, right {right:g}, bottom {bottom:g} is invalid. Expected "
            f"numbers up to {_MOST}, left <= right and top <= bottom: correct the annotation."
        )
    return right > left and bottom > top


def number(value: Any) -> float:
    """A number of an annotation.

    Raises:
        TypeError, ValueError: the value is not a number; Python would read ``1_0`` as ten.
    """
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def stated_size(height: Any, width: Any) -> tuple[int, int] | None:
    """The (height, width) that an annotation states; ``None`` unless both are positive whole numbers."""
    try:
        size = int(number(height)), int(number(width))
    except (TypeError, ValueError, OverflowError):
        return None
    return size if min(size) > 0 else None


def flag(text: object) -> bool:
    """A yes or no of an annotation, in any spelling.

    Raises:
        ValueError: it is neither.
    """
    word = str(text).strip().lower()
    if word in ("1", "1.0", "true", "yes", "t", "y"):
        return True
    if word in ("", "0", "0.0", "false", "no", "f", "n", "none", "unspecified"):
        return False
    raise ValueError(f"{word!r} is neither 0 nor 1")
