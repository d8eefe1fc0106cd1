"""What is known of the objects in an image, and where the files say it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mtr_lab.data.annotated import AnnotatedSource
from mtr_lab.errors import UserError


@dataclass(frozen=True)
class Objects:
    """The n objects of one image."""

    boxes: np.ndarray
    """(n, 4) float32: left, top, right, bottom edge, pixels from the image's top left corner."""
    labels: np.ndarray
    """(n,) int64, classes from 0."""
    ignore: np.ndarray
    """(n,) bool: a crowd or a difficult object, neither trained on nor missed if it is not found."""
    segmentations: tuple[Any, ...] | None = None
    """Polygons or run lengths, as COCO writes them; None where there are boxes alone."""

    @classmethod
    def of(
        cls, rows: Sequence[tuple[Sequence[float], int, bool]], segmentations: Sequence[Any] | None = None
    ) -> "Objects":
        """From (box, class, ignored), one an object."""
        return cls(
            np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
            np.array([row[1] for row in rows], np.int64),
            np.array([row[2] for row in rows], bool),
            None if segmentations is None else tuple(segmentations),
        )


class ObjectSource(AnnotatedSource, Protocol):
    """Images with objects; all annotations have been checked when it exists.

    ``degenerate`` counts the boxes without area that were left out.
    """

    degenerate: int

    def objects(self, index: int) -> Objects: ...


def check_box(box: Sequence[float], where: str) -> bool:
    """Whether a box has an area.

    Raises:
        UserError: its edges are not four finite numbers in order; ``where`` says which box it is.
    """
    left, top, right, bottom = box
    if not all(map(math.isfinite, box)) or right < left or bottom < top:
        raise UserError(
            f"{where}: the box left {left:g}, top {top:g}, right {right:g}, bottom {bottom:g} is none. Expected finite "
            "numbers, left <= right and top <= bottom: correct the annotation."
        )
    return right > left and bottom > top
