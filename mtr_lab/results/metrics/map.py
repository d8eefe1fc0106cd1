"""COCO's average precision: the mean over classes and over overlaps of 0.5 to 0.95, of masks if there are any."""

from typing import Any

import numpy as np

from mtr_lab.results.detections import Detections
from mtr_lab.results.metrics.metric import PooledMetric
from mtr_lab.results.resampling import AP_RESAMPLES


def average_precision(column: int, **labels: Any) -> PooledMetric:
    """The metric in a column of ``Detections.figures`` and ``Detections.resampled``."""

    def value(predictions: Detections, point: int) -> float:
        return float(predictions.figures[point, column])

    def resampled(predictions: Detections, point: int, resamples: int, seed: int) -> np.ndarray:
        return predictions.resampled(point, resamples, seed)[:, column]

    return PooledMetric(
        task="detection", unit="%", better=1, value=value, resampled=resampled, resamples=AP_RESAMPLES, **labels
    )


METRIC = average_precision(0, key="map", order=40, name="AP", heading="AP", axis="AP, %", latex="AP (\\%)")
