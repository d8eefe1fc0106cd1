"""``predictions.npz`` of a detection run: what every point found in every image, and what the figures follow from."""

from dataclasses import dataclass, replace
from typing import Self, TypedDict

import numpy as np

from mtr_lab.results.average_precision import Matches, average_precision
from mtr_lab.results.predictions import Predictions

_OF_DETECTIONS = ("image", "label", "score", "box", "found")
RESAMPLES = 500
"""Of the images, for an interval."""


@dataclass(frozen=True, eq=False)
class Detections(Predictions):
    """n images, p points, K classes, d detections in all images and at all points.

    ``labels`` (n, K) int64 are the number of objects of each class in an image, without those to ignore.
    """

    of_points = ("figures",)

    figures: np.ndarray  # (p, 2) float64, AP and AP50 of the points as torchmetrics computes them
    point: np.ndarray  # (d,) int64
    image: np.ndarray  # (d,) int64
    label: np.ndarray  # (d,) int64, class from 0
    score: np.ndarray  # (d,) float32
    box: np.ndarray  # (d, 4) float32: left, top, right, bottom, pixels of the image
    found: np.ndarray  # (d, 10) int8, see Matches

    def __post_init__(self) -> None:
        n, p, d = len(self.ids), len(self.points), len(self.point)
        expected = {"hashes": (n,), "labels": (n, *self.labels.shape[1:2]), "figures": (p, 2), "image": (d,)}
        self.check_shapes(expected | {"label": (d,), "score": (d,), "box": (d, 4), "found": (d, 10)})

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
        """What one point found."""
        rows = self.point == point
        return Matches(
            self.image[rows], self.label[rows], self.score[rows], self.box[rows], self.found[rows], self.labels
        )


class DetectionScore(TypedDict):
    """The metrics of one point; fractions, intervals [lo, hi] of level 0.95 from a bootstrap over images."""

    images: int
    map: float
    map_ci: list[float]
    ap50: float
    ap50_ci: list[float]


def score_detections(detections: Detections, point: int) -> DetectionScore:
    """The metrics of one point of a detection run."""
    resampled = resampled_precision(detections.matches(point))
    low, high = np.nanquantile(resampled, [0.025, 0.975], axis=0)
    mean, half = (float(value) for value in detections.figures[point])
    return {
        "images": len(detections.ids),
        "map": mean,
        "map_ci": [float(low[0]), float(high[0])],
        "ap50": half,
        "ap50_ci": [float(low[1]), float(high[1])],
    }


def resampled_precision(matches: Matches, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """AP and AP50 of images drawn with replacement, (resamples, 2); the same draws for the same number of images.

    Source: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7, 1979.
    """
    rng = np.random.default_rng(seed)
    n = len(matches.objects)
    draws = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(resamples))
    found = [average_precision(matches, counts) for counts in draws]
    return np.array([(each.mean(), each[0]) for each in found])
