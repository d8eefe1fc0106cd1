"""Top-1 accuracy: the share of images whose most probable class is the label."""

import numpy as np

from mtr_lab.results.classifications import Classifications
from mtr_lab.results.metrics.metric import MeanOverImages, share_interval


def per_image(predictions: Classifications, point: int) -> np.ndarray:
    """1 where the most probable class is the label, else 0: (n,)."""
    return (predictions.top5[point, :, 0] == predictions.labels).astype(float)


METRIC = MeanOverImages(
    key="top1",
    task="classification",
    also=("video",),
    order=10,
    name="Top-1",
    heading="top-1",
    axis="Top-1 accuracy, %",
    latex="Top-1 (\\%)",
    unit="%",
    better=1,
    per_image=per_image,
    mean_interval=share_interval,
)
