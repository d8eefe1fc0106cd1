"""Average precision at an overlap of 0.5, of masks if there are any."""

import numpy as np

from mtr_lab.results.detections import Detections
from mtr_lab.results.metrics.metric import PooledMetric
from mtr_lab.results.resampling import AP_RESAMPLES

_COLUMN = 1  # of Detections.figures and of resampled()


def _value(predictions: Detections, point: int) -> float:
    return float(predictions.figures[point, _COLUMN])


def _resampled(predictions: Detections, point: int, resamples: int, seed: int) -> np.ndarray:
    return predictions.resampled(point, resamples, seed)[:, _COLUMN]


METRIC = PooledMetric(
    key="ap50",
    task="detection",
    order=50,
    name="AP50",
    heading="AP50",
    axis="AP50, %",
    latex="AP$_{50}$ (\\%)",
    unit="%",
    better=1,
    value=_value,
    resampled=_resampled,
    resamples=AP_RESAMPLES,
)
