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
    if not np.array_equal(first.hashes, second.hashes):
        common = len(np.intersect1d(first.hashes, second.hashes))
        raise UserError(
            f"these runs cannot be paired: {len(first.hashes)} and {len(second.hashes)} images, {common} of them in "
            "common, or in another order. Evaluate both on the same dataset with the same settings."
        )
    metrics = [_per_image(first, i), _per_image(second, j)]
    differences: dict[str, Difference] = {}
    for name in metrics[0]:
        values = metrics[1][name] - metrics[0][name]
        lo, hi = bootstrap_interval(values, resamples, seed)
        differences[name] = {"difference": float(values.mean()), "ci": [lo, hi], "significant": lo > 0 or hi < 0}
    return differences


def _per_image(predictions: Predictions, point: int) -> dict[str, np.ndarray]:
    best = predictions.top5[point, :, 0]
    return {
        "top1": (best == predictions.labels).astype(float),
        "agreement": (best == predictions.top5[0, :, 0]).astype(float),
        "kl": kl_divergence(predictions.log_probs[0], predictions.log_probs[point]),
    }
