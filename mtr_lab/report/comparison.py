"""The paired difference between two points, of one run or of two on the same images."""

from typing import TypedDict

import numpy as np

from mtr_lab.errors import UserError
from mtr_lab.measure.statistics import bootstrap_interval
from mtr_lab.report.predictions import Predictions, kl_divergence


class Difference(TypedDict):
    """Second minus first; ``ci`` is the paired bootstrap interval of level 0.95, ``significant`` if it excludes 0."""

    difference: float
    ci: list[float]
    significant: bool


def compare(
    first: Predictions, i: int, second: Predictions, j: int, *, resamples: int = 10_000, seed: int = 0
) -> dict[str, Difference]:
    """How point ``j`` of one run differs from point ``i`` of another, image by image.

    Args:
        first, second: runs over the same images in the same order; their points 0 are the unreduced model.
        resamples, seed: of the bootstrap over images (Efron 1979).

    Returns:
        differences of ``top1`` and ``agreement`` (fractions) and of ``kl`` (nats an image).

    Raises:
        UserError: the runs are on different images.
    """
    check_same_images(first.hashes, second.hashes)
    metrics = [per_image(first, i), per_image(second, j)]
    differences: dict[str, Difference] = {}
    for name in metrics[0]:
        values = metrics[1][name] - metrics[0][name]
        lo, hi = bootstrap_interval(values, resamples, seed)
        differences[name] = {"difference": float(values.mean()), "ci": [lo, hi], "significant": lo > 0 or hi < 0}
    return differences


def check_same_images(first: np.ndarray, second: np.ndarray, names: str = "these runs") -> None:
    """Raise a ``UserError`` unless the hashes of two runs' images are equal, in the same order."""
    if not np.array_equal(first, second):
        common = len(np.intersect1d(first, second))
        raise UserError(
            f"{names} cannot be paired: {len(first)} and {len(second)} images, {common} of them in "
            "common, or in another order. Evaluate both on the same dataset with the same settings."
        )


def per_image(predictions: Predictions, point: int) -> dict[str, np.ndarray]:
    """``top1`` and ``agreement`` (0 or 1) and ``kl`` (nats) of a point for each image, (n,)."""
    best = predictions.top5[point, :, 0]
    return {
        "top1": (best == predictions.labels).astype(float),
        "agreement": (best == predictions.top5[0, :, 0]).astype(float),
        "kl": kl_divergence(predictions.log_probs[0], predictions.log_probs[point]),
    }
