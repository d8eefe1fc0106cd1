"""The predictions of a detection run: the detections of every image at every point."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np

from mtr_lab.results.average_precision import Matches, resampled_precision
from mtr_lab.results.predictions import Predictions

_OF_DETECTIONS = ("image", "label", "score", "box", "hits")


@dataclass(frozen=True, eq=False)
class Detections(Predictions):
    """n images, p points, K classes, d detections in all images and at all points.

    ``labels`` (n, K) int64 are the number of objects of each class in an image, without those to ignore.
    """

    task = "detection"
    of_points = ("figures",)

    figures: np.ndarray  # (p, 2) float64, AP and AP50 of the points as torchmetrics computes them
    point: np.ndarray  # (d,) int64
    image: np.ndarray  # (d,) int64
    label: np.ndarray  # (d,) int64, class from 0
    score: np.ndarray  # (d,) float32
    box: np.ndarray  # (d, 4) float32: left, top, right, bottom, pixels of the image
    hits: np.ndarray  # (d, 10) int8, see Matches

    def __post_init__(self) -> None:
        n, p, d = len(self.ids), len(self.points), len(self.point)
        expected = {"hashes": (n,), "labels": (n, *self.labels.shape[1:2]), "figures": (p, 2), "image": (d,)}
        self.check_shapes(expected | {"label": (d,), "score": (d,), "box": (d, 4), "hits": (d, 10)})

    def select(self, points: slice) -> Self:
        chosen = range(len(self.points))[points]
        rows = np.isin(self.point, chosen)
        detections = {name: getattr(self, name)[rows] for name in _OF_DETECTIONS}
        return replace(super().select(points), point=np.searchsorted(chosen, self.point[rows]), **detections)

    def concat(self, other: Self) -> Self:
        detections = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in _OF_DETECTIONS}
        point = np.concatenate([self.point, other.point + len(self.points)])
        return replace(super().concat(other), point=point, **detections)

    def matches(self, point: int) -> Matches:
        """The detections of one point, matched with the objects of their images."""
        rows = self.point == point
        return Matches(
            self.image[rows], self.label[rows], self.score[rows], self.box[rows], self.hits[rows], self.labels
        )

    def resampled(self, point: int, resamples: int, seed: int) -> np.ndarray:
        """See ``resampled_precision``; computed once for each point and drawing, since two metrics read it."""
        key = (point, resamples, seed)
        if key not in self._resampled:
            self._resampled[key] = resampled_precision(self.matches(point), resamples, seed)
        return self._resampled[key]

    @cached_property
    def _resampled(self) -> dict[tuple[int, int, int], np.ndarray]:
        return {}
