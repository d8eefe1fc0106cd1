"""Top-5 accuracy: the share of images whose label is among the five most probable classes."""

import numpy as np

from mtr_lab.results.classifications import Classifications
from mtr_lab.results.metrics.metric import MeanOverImages, share_interval


def per_image(predictions: Classifications, point: int) -> np.ndarray:
    """1 where the label is among the five most probable classes, else 0: (n,)."""
    top5 = predictions.top5[point]
    correct = (top5 == predictions.labels[:, None]) & (top5 >= 0)  # an unknown label, -1, is not the padding
    return correct.any(axis=1).astype(float)


METRIC = MeanOverImages(
    key="top5",
    task="classification",
    also=("video",),
    order=20,
    name="Top-5",
    heading="top-5",
    axis="Top-5 accuracy, %",
    latex="Top-5 (\\%)",
    unit="%",
    better=1,
    compared=False,
    per_image=per_image,
    mean_interval=share_interval,
)
