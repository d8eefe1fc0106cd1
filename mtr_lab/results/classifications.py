"""The predictions of a classification run, and the metrics computed from them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from mtr_lab.measure.statistics import bootstrap_interval, wilson_interval
from mtr_lab.results.predictions import Predictions

if TYPE_CHECKING:
    from torch import Tensor  # reports do without PyTorch

TOP = 5
_IMAGES_AT_ONCE = 1024  # of K float64 log-probabilities, when divergences are computed


@dataclass(frozen=True, eq=False)
class Classifications(Predictions):
    """n images, p points, K classes; ``labels`` (n,) int64, -1 if unknown, which counts as a wrong prediction."""

    of_points = ("top5", "log_probs")

    top5: np.ndarray  # (p, n, 5) int32, classes by falling probability, -1 beyond the K-th
    log_probs: np.ndarray  # (p, n, K) float32

    def __post_init__(self) -> None:
        n, p = len(self.ids), len(self.points)
        expected = {"ids": (n,), "hashes": (n,), "labels": (n,), "points": (p,), "top5": (p, n, TOP)}
        self.check_shapes(expected | {"log_probs": (p, n, *self.log_probs.shape[2:3])})


class Score(TypedDict):
    """The metrics of one point; fractions, ``kl`` in nats an image, intervals [lo, hi] of level 0.95."""

    images: int
    top1: float
    top1_ci: list[float]
    top5: float
    top5_ci: list[float]
    agreement: float
    agreement_ci: list[float]
    kl: float
    kl_ci: list[float]


def top_classes(log_probs: "Tensor") -> "Tensor":
    """The classes of (…, K) log-probabilities by falling probability: (…, 5) int32, -1 beyond the K-th.

    Of equally probable classes the lower comes first, which ``topk`` does not promise; NaN comes before all.
    """
    best = log_probs.sort(dim=-1, descending=True, stable=True).indices[..., :TOP].int()
    found = best.new_full((*best.shape[:-1], TOP), -1)
    found[..., : best.shape[-1]] = best
    return found


def score_point(predictions: Classifications, point: int, reference: int = 0) -> Score:
    """The metrics of one point of a classification run.

    Accuracies and agreement have Wilson intervals, the divergence a bootstrap interval over images. The reference
    agrees with itself by definition: agreement 1, divergence 0, no uncertainty.

    Args:
        predictions: at least one image.
        point: which point to score.
        reference: the point of the unreduced model.
    """
    top5, labels = predictions.top5[point], predictions.labels[:, None]
    correct = (top5 == labels) & (top5 >= 0)  # (n, 5)
    agrees = top5[:, 0] == predictions.top5[reference, :, 0]
    kl = kl_divergence(predictions.log_probs[reference], predictions.log_probs[point])
    itself = point == reference
    return {
        "images": len(kl),
        "top1": float(correct[:, 0].mean()),
        "top1_ci": _share_interval(correct[:, 0]),
        "top5": float(correct.any(axis=1).mean()),
        "top5_ci": _share_interval(correct.any(axis=1)),
        "agreement": float(agrees.mean()),
        "agreement_ci": [1.0, 1.0] if itself else _share_interval(agrees),
        "kl": float(kl.mean()),
        "kl_ci": list(bootstrap_interval(kl)),
    }


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


def _share_interval(hits: np.ndarray) -> list[float]:
    return list(wilson_interval(int(hits.sum()), len(hits)))
