"""The paired differences between points, of one run or of several on the same images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from mtr_lab.errors import UserError
from mtr_lab.results.classifications import Classifications, kl_divergence
from mtr_lab.results.detections import Detections, resampled_precision
from mtr_lab.results.predictions import Predictions
from mtr_lab.results.segmentations import Segmentations, interval, mean_iou, resampled_iou

RESAMPLES = 10_000
_RESAMPLES_AT_ONCE = 64


class Difference(TypedDict):
    """Second minus first; ``ci`` is the paired bootstrap interval of level 0.95, ``significant`` if it excludes 0."""

    difference: float
    ci: list[float]
    significant: bool


@dataclass(frozen=True)
class Sample:
    """What pairing needs of a run: a small part of its predictions."""

    hashes: np.ndarray  # (n,) str, of the images
    points: list[str]  # see point_name
    metrics: list[dict[str, np.ndarray]]  # of each point: its metrics, (n,) values an image

    @classmethod
    def of(cls, predictions: Predictions) -> "Sample":
        """Raises a ``UserError`` for dense tasks, whose metrics are no means over images."""
        if not isinstance(predictions, Classifications):
            raise UserError(
                "the metrics of detection and segmentation are no means over images: "
                "mtr_lab.results.comparison.compare pairs them."
            )
        points = [str(point) for point in predictions.points]
        return cls(predictions.hashes, points, [per_image(predictions, i) for i in range(len(points))])


def compare(
    first: Predictions, i: int, second: Predictions, j: int, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Difference]:
    """How point ``j`` of one run differs from point ``i`` of another, image by image.

    Args:
        first, second: runs over the same images in the same order; their points 0 are the unreduced model.
        resamples, seed: of the bootstrap over images (Efron 1979); detections and segmentations are resampled
            ``RESAMPLES`` times of their own modules.

    Returns:
        differences of ``top1`` and ``agreement`` (fractions) and of ``kl`` (nats an image); between detections, of
        ``map`` and ``ap50``; between segmentations, of ``miou``.

    Raises:
        UserError: the runs are on different images, or of different tasks.
    """
    check_same_images(first.hashes, second.hashes)
    if isinstance(first, Detections) and isinstance(second, Detections):
        return _compare_detections(first, i, second, j, seed)
    if isinstance(first, Segmentations) and isinstance(second, Segmentations):
        return _compare_segmentations(first, i, second, j, seed)
    if not isinstance(first, Classifications) or not isinstance(second, Classifications):
        raise UserError("these runs cannot be paired: they are of different tasks.")
    points = [per_image(first, i), per_image(second, j)]
    return compare_all(points, [(0, 1)], resamples=resamples, seed=seed)[0]


def compare_all(
    points: Sequence[dict[str, np.ndarray]],
    pairs: Sequence[tuple[int, int]],
    *,
    runs: Sequence[int] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[dict[str, Difference]]:
    """What ``compare`` finds for every pair, from one drawing of images, which is what takes the time.

    Args:
        points: the same metrics of each point, (n,) values an image, all on the same images in the same order.
        pairs: (first, second), places in ``points``.
        runs: over how many runs the values of each point are summed, whose mean is compared; by default one.
        resamples, seed: of the bootstrap over images (Efron 1979).

    Returns:
        for each pair and metric, second minus first with its paired percentile interval of level 0.95.
    """
    if not pairs:
        return []
    names = list(points[0])
    values = np.stack([point[name] for point in points for name in names], axis=1)
    # Sums, not means: those of hits and misses are exact, so that an end of an interval that is 0 is not 1e-17.
    sums = _resampled_sums(values, resamples, seed).reshape(resamples, len(points), len(names))
    runs = runs or [1] * len(points)

    def difference(i: int, j: int, k: int) -> Difference:
        m, n, name = runs[i], runs[j], names[k]  # m · n times the difference of the means, without dividing
        return _difference(n * points[i][name], m * points[j][name], m * sums[:, j, k] - n * sums[:, i, k], m * n)

    return [{name: difference(i, j, k) for k, name in enumerate(names)} for i, j in pairs]


def check_same_images(first: np.ndarray, second: np.ndarray, names: str = "these runs") -> None:
    """Raise a ``UserError`` unless the hashes of two runs' images are equal, in the same order."""
    if not np.array_equal(first, second):
        common = len(np.intersect1d(first, second))
        raise UserError(
            f"{names} cannot be paired: {len(first)} and {len(second)} images, {common} of them in "
            "common, or in another order. Evaluate both on the same dataset with the same settings."
        )


def per_image(predictions: Classifications, point: int) -> dict[str, np.ndarray]:
    """``top1`` and ``agreement`` (0 or 1) and ``kl`` (nats) of a point for each image, (n,)."""
    best = predictions.top5[point, :, 0]
    return {
        "top1": (best == predictions.labels).astype(float),
        "agreement": (best == predictions.top5[0, :, 0]).astype(float),
        "kl": kl_divergence(predictions.log_probs[0], predictions.log_probs[point]),
    }


def _compare_detections(first: Detections, i: int, second: Detections, j: int, seed: int) -> dict[str, Difference]:
    """The images are drawn alike for both, so the resampled differences are paired."""
    before, after = (resampled_precision(run.matches(k), seed=seed) for run, k in ((first, i), (second, j)))
    lows, highs = np.nanquantile(after - before, [0.025, 0.975], axis=0)
    differences = second.figures[j] - first.figures[i]
    ends = zip(("map", "ap50"), differences.tolist(), lows.tolist(), highs.tolist(), strict=True)
    return {
        name: {"difference": difference, "ci": [lo, hi], "significant": lo > 0 or hi < 0}
        for name, difference, lo, hi in ends
    }


def _compare_segmentations(
    first: Segmentations, i: int, second: Segmentations, j: int, seed: int
) -> dict[str, Difference]:
    """The images are drawn alike for both, so the resampled differences are paired."""
    before, after = first.confusion[i], second.confusion[j]
    lo, hi = interval(resampled_iou(after, seed=seed) - resampled_iou(before, seed=seed))
    difference = mean_iou(after.sum(0)) - mean_iou(before.sum(0))
    return {"miou": {"difference": difference, "ci": [lo, hi], "significant": lo > 0 or hi < 0}}


def _difference(first: np.ndarray, second: np.ndarray, resampled: np.ndarray, scale: int) -> Difference:
    if np.array_equal(first, second):  # else their sums would differ by rounding
        return {"difference": 0.0, "ci": [0.0, 0.0], "significant": False}
    lo, hi = (float(end) / len(first) / scale for end in np.quantile(resampled, [0.025, 0.975]))
    return {"difference": float((second - first).mean()) / scale, "ci": [lo, hi], "significant": lo > 0 or hi < 0}


def _resampled_sums(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(resamples, m) sums over n rows of (n, m) values drawn with replacement, the same rows for each column."""
    n, m = values.shape
    rng = np.random.default_rng(seed)
    sums = np.empty((resamples, m))
    counts = np.empty((_RESAMPLES_AT_ONCE, n))
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        chunk = sums[start : start + _RESAMPLES_AT_ONCE]
        for row in counts[: len(chunk)]:
            row[:] = np.bincount(rng.integers(n, size=n, dtype=np.int32), minlength=n)
        np.matmul(counts[: len(chunk)], values, out=chunk)
    return sums
