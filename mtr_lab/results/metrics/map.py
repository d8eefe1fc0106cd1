"""COCO's average precision: the mean over classes and over overlaps of 0.5 to 0.95, of masks if there are any."""

import numpy as np

from mtr_lab.results.detections import Detections
from mtr_lab.results.metrics.metric import PooledMetric
from mtr_lab.results.resampling import AP_RESAMPLES

_COLUMN = 0  # of Detections.figures and of resampled()


def _value(predictions: Detections, point: int) -> float:
    return float(predictions.figures[point, _COLUMN])


def _resampled(predictions: Detections, point: int, resamples: int, seed: int) -> np.ndarray:
    return predictions.resampled(point, resamples, seed)[:, _COLUMN]


METRIC = PooledMetric(
    key="map",
    task="detection",
    order=40,
    name="AP",
    heading="AP",
    axis="AP, %",
    latex="AP (\\%)",
    unit="%",
    better=1,
    value=_value,
    resampled=_resampled,
    resamples=AP_RESAMPLES,
)
