"""The annotated objects of an image, and the interface of sources of such images."""

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
    """(n, 4) float32: left, top, right, bottom, in pixels from the image's top left corner."""
    labels: np.ndarray
    """(n,) int64, classes from 0."""
    ignore: np.ndarray
    """(n,) bool: crowds (COCO) and difficult objects (VOC), which neither training nor evaluation counts."""
    segmentations: tuple[Any, ...] | None = None
    """COCO's polygons or run lengths; None if the source has boxes only."""

    @classmethod
    def of(
        cls, rows: Sequence[tuple[Sequence[float], int, bool]], segmentations: Sequence[Any] | None = None
    ) -> "Objects":
        """From (box, class, ignore) of each object."""
        return cls(
            np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
            np.array([row[1] for row in rows], np.int64),
            np.array([row[2] for row in rows], bool),
            None if segmentations is None else tuple(segmentations),
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
        UserError: its edges are not finite numbers in order; ``name`` names the box.
    """
    left, top, right, bottom = box
    if not all(map(math.isfinite, box)) or right < left or bottom < top:
        raise UserError(
            f"{name}: the box left {left:g}, top {top:g}, right {right:g}, bottom {bottom:g} is invalid. Expected "
            "finite numbers, left <= right and top <= bottom: correct the annotation."
        )
    return right > left and bottom > top
