"""Mean intersection over union of the classes, over the pixels of all images together."""

import math

import numpy as np

from mtr_lab.results.metrics.metric import PooledMetric
from mtr_lab.results.resampling import IOU_RESAMPLES, resampled_counts
from mtr_lab.results.segmentations import Segmentations


def mean_iou(confusion: np.ndarray) -> float:
    """The mean over the classes of intersection over union.

    Args:
        confusion: (K, K) pixels by true class and by predicted class.

    Returns:
        A fraction. Classes that are neither in the labels nor predicted do not count; NaN if that leaves none.
    """
    return float(_mean_ratio(_overlaps(confusion)))


def resampled_iou(confusion: np.ndarray, resamples: int = IOU_RESAMPLES, seed: int = 0) -> np.ndarray:
    """``mean_iou`` of images (n, K, K) drawn with replacement, (resamples,)."""
    overlaps = _overlaps(confusion)
    draws = resampled_counts(len(confusion), resamples, seed)
    return np.array([_mean_ratio(np.tensordot(counts, overlaps, 1)) for counts in draws])


def _overlaps(confusion: np.ndarray) -> np.ndarray:
    """Intersection and union in pixels of every class, (…, 2, K), of (…, K, K)."""
    counts = confusion.astype(np.int64)
    both = np.diagonal(counts, axis1=-2, axis2=-1)
    return np.stack([both, counts.sum(-1) + counts.sum(-2) - both], axis=-2)


def _mean_ratio(overlaps: np.ndarray) -> float:
    both, union = overlaps
    present = union > 0
    return float(np.mean(both[present] / union[present])) if present.any() else math.nan


def _value(predictions: Segmentations, point: int) -> float:
    return mean_iou(predictions.confusion[point].sum(0))


def _resampled(predictions: Segmentations, point: int, resamples: int, seed: int) -> np.ndarray:
    return resampled_iou(predictions.confusion[point], resamples, seed)


METRIC = PooledMetric(
    key="miou",
    task="segmentation",
    order=30,
    name="mIoU",
    heading="mIoU",
    axis="Mean IoU, %",
    latex="mIoU (\\%)",
    unit="%",
    better=1,
    value=_value,
    resampled=_resampled,
    resamples=IOU_RESAMPLES,
    difference_in_result=True,
)
