"""``predictions.npz`` of a segmentation run: the confusion matrix of every image at every point."""

import math
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from mtr_lab.results.predictions import Predictions

RESAMPLES = 2000
"""Of the images, for an interval."""


@dataclass(frozen=True, eq=False)
class Segmentations(Predictions):
    """n images, p points, K classes.

    ``labels`` (n, K) int64 are the number of pixels of each class in an image, without those to ignore.
    """

    of_points = ("confusion",)

    confusion: np.ndarray  # (p, n, K, K) int32, pixels by true class and by predicted class

    def __post_init__(self) -> None:
        n, p, k = len(self.ids), len(self.points), self.labels.shape[-1]
        self.check_shapes({"hashes": (n,), "labels": (n, k), "confusion": (p, n, k, k)})


class SegmentationScore(TypedDict):
    """The metric of one point; fractions, intervals [lo, hi] of level 0.95 from a bootstrap over images."""

    images: int
    miou: float
    miou_ci: list[float]
    miou_difference: float
    miou_difference_ci: list[float]


def score_segmentations(segmentations: Segmentations, point: int, reference: int = 0) -> SegmentationScore:
    """The metric of one point, and its paired difference to the unreduced model's."""
    resampled, before = (resampled_iou(segmentations.confusion[i]) for i in (point, reference))
    means = [mean_iou(segmentations.confusion[i].sum(0)) for i in (point, reference)]
    return {
        "images": len(segmentations.ids),
        "miou": means[0],
        "miou_ci": interval(resampled),
        "miou_difference": means[0] - means[1],
        "miou_difference_ci": interval(resampled - before),
    }


def mean_iou(confusion: np.ndarray) -> float:
    """The mean over the classes of intersection over union, of (K, K) pixels by class and by class found.

    Classes that neither occur nor are found are left out; NaN if that leaves none.
    """
    return float(_mean_ratio(_overlaps(confusion)))


def resampled_iou(confusion: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """``mean_iou`` of images (n, K, K) drawn with replacement, (resamples,); the same draws for the same n.

    Source: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7, 1979.
    """
    rng = np.random.default_rng(seed)
    n = len(confusion)
    overlaps = _overlaps(confusion)
    draws = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(resamples))
    return np.array([_mean_ratio(np.tensordot(counts, overlaps, 1)) for counts in draws])


def interval(resampled: np.ndarray) -> list[float]:
    """[lo, hi] of level 0.95; a draw of images without any class has no part in it."""
    return [float(end) for end in np.nanquantile(resampled, [0.025, 0.975])]


def _overlaps(confusion: np.ndarray) -> np.ndarray:
    """Intersection and union in pixels of every class, (…, 2, K), of (…, K, K)."""
    counts = confusion.astype(np.int64)
    both = np.diagonal(counts, axis1=-2, axis2=-1)
    return np.stack([both, counts.sum(-1) + counts.sum(-2) - both], axis=-2)


def _mean_ratio(overlaps: np.ndarray) -> float:
    both, union = overlaps
    there = union > 0
    return float(np.mean(both[there] / union[there])) if there.any() else math.nan
