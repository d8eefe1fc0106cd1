"""The predictions of a classification run."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mtr_lab.results.predictions import Predictions

if TYPE_CHECKING:
    from torch import Tensor  # reports do without PyTorch

TOP = 5


@dataclass(frozen=True, eq=False)
class Classifications(Predictions):
    """n images, p points, K classes; ``labels`` (n,) int64, -1 if unknown, which counts as a wrong prediction."""

    task = "classification"
    of_points = ("top5", "log_probs")

    top5: np.ndarray  # (p, n, 5) int32, classes by falling probability, -1 beyond the K-th
    log_probs: np.ndarray  # (p, n, K) float32

    def __post_init__(self) -> None:
        n, p = len(self.ids), len(self.points)
        expected = {"ids": (n,), "hashes": (n,), "labels": (n,), "points": (p,), "top5": (p, n, TOP)}
        self.check_shapes(expected | {"log_probs": (p, n, *self.log_probs.shape[2:3])})


@dataclass(frozen=True, eq=False)
class VideoClassifications(Classifications):
    """The same of videos."""

    task = "video"


def top_classes(log_probs: "Tensor") -> "Tensor":
    """The five most probable classes of (…, K) log-probabilities: (…, 5) int32, -1 beyond the K-th.

    Of equally probable classes the lower comes first, which ``topk`` does not guarantee; NaN comes before all numbers.
    """
    best = log_probs.sort(dim=-1, descending=True, stable=True).indices[..., :TOP].int()
    padded = best.new_full((*best.shape[:-1], TOP), -1)
    padded[..., : best.shape[-1]] = best
    return padded
