"""Agreement: the share of images with the unreduced model's top-1 class."""

import numpy as np

from mtr_lab.results.classifications import Classifications
from mtr_lab.results.metrics.metric import MeanOverImages, share_interval


def per_image(predictions: Classifications, point: int) -> np.ndarray:
    """1 where both models have the same most probable class, else 0: (n,)."""
    return (predictions.top5[point, :, 0] == predictions.top5[0, :, 0]).astype(float)


METRIC = MeanOverImages(
    key="agreement",
    task="classification",
    also=("video",),
    order=60,
    name="Agreement",
    heading="agree",
    axis="Agreement with the unreduced model, %",
    latex="Agreement (\\%)",
    unit="%",
    better=1,
    relative=True,
    per_image=per_image,
    mean_interval=share_interval,
)
