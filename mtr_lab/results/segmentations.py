"""The predictions of a segmentation run: the confusion matrix of every image at every point."""

from dataclasses import dataclass

import numpy as np

from mtr_lab.results.predictions import Predictions


@dataclass(frozen=True, eq=False)
class Segmentations(Predictions):
    """n images, p points, K classes.

    ``labels`` (n, K) int64 are the number of pixels of each class in an image, without those to ignore.
    """

    task = "segmentation"
    of_points = ("confusion",)

    confusion: np.ndarray  # (p, n, K, K) int32, pixels by true class and by predicted class

    def __post_init__(self) -> None:
        n, p, k = len(self.ids), len(self.points), self.labels.shape[-1]
        self.check_shapes({"hashes": (n,), "labels": (n, k), "confusion": (p, n, k, k)})
