"""KL divergence: how far the class probabilities are from those of the unreduced model."""

import numpy as np

from mtr_lab.measure.statistics import bootstrap_interval
from mtr_lab.results.classifications import Classifications
from mtr_lab.results.metrics.metric import MeanOverImages
from mtr_lab.results.resampling import RESAMPLES

_IMAGES_AT_ONCE = 1024  # of K float64 log-probabilities


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference ‖ other) of each image, computed in float64.

    Args:
        reference: (n, K) log-probabilities.
        other: (n, K) log-probabilities.

    Returns:
        (n,) nats, at least 0.
    """
    divergence = np.empty(len(reference))
    for start in range(0, len(reference), _IMAGES_AT_ONCE):
        rows = slice(start, start + _IMAGES_AT_ONCE)
        log_p, log_q = reference[rows].astype(np.float64), other[rows].astype(np.float64)
        p, q = np.exp(log_p), np.exp(log_q)
        # float32 log-probabilities do not sum to exactly 1: with q - p no term, hence no divergence, is negative.
        divergence[rows] = (p * (log_p - log_q) + q - p).sum(axis=1)
    return divergence


def per_image(predictions: Classifications, point: int) -> np.ndarray:
    """KL(unreduced ‖ reduced), (n,) nats."""
    return kl_divergence(predictions.log_probs[0], predictions.log_probs[point])


METRIC = MeanOverImages(
    key="kl",
    task="classification",
    also=("video",),
    order=70,
    name="KL",
    heading="KL",
    axis="KL to the unreduced model, nats an image",
    latex="KL (nats)",
    unit="nats",
    better=-1,
    relative=True,
    per_image=per_image,
    mean_interval=lambda values: bootstrap_interval(values, RESAMPLES),
)
