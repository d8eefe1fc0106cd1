"""Balanced accuracy of videos: the mean over the classes of the share of their videos whose class is right."""

import numpy as np

from mtr_lab.results.classifications import Classifications
from mtr_lab.results.metrics.metric import PooledMetric
from mtr_lab.results.metrics.top1 import per_image
from mtr_lab.results.resampling import IOU_RESAMPLES, resampled_counts


def mean_recall(hits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The mean over the classes among ``labels`` (n,) of the mean of their ``hits`` (n,), with ``weights`` (n,)."""
    kept = labels >= 0 if weights is None else (labels >= 0) & (weights > 0)
    if not kept.any():
        return float("nan")
    weights = np.ones(len(labels)) if weights is None else weights
    right = np.bincount(labels[kept], (hits * weights)[kept])
    total = np.bincount(labels[kept], weights[kept])
    return float((right[total > 0] / total[total > 0]).mean())


def _value(predictions: Classifications, point: int) -> float:
    return mean_recall(per_image(predictions, point), predictions.labels)


def _resampled(predictions: Classifications, point: int, resamples: int, seed: int) -> np.ndarray:
    hits, labels = per_image(predictions, point), predictions.labels
    draws = resampled_counts(len(labels), resamples, seed)
    return np.array([mean_recall(hits, labels, counts) for counts in draws])


METRIC = PooledMetric(
    key="balanced_accuracy",
    task="video",
    order=28,
    name="Balanced accuracy",
    heading="bal. acc.",
    axis="Balanced accuracy, %",
    latex="Balanced (\\%)",
    unit="%",
    better=1,
    value=_value,
    resampled=_resampled,
    resamples=IOU_RESAMPLES,
)
