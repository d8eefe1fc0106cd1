"""Paired differences between points, of one run or of several runs on the same images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtr_lab.errors import UserError
from mtr_lab.measure.statistics import holm, mcnemar
from mtr_lab.results.metrics import task_metrics
from mtr_lab.results.metrics.metric import Drawn, MeanOverImages, PooledMetric
from mtr_lab.results.predictions import Predictions
from mtr_lab.results.resampling import (
    RESAMPLES,
    Difference,
    normal_p,
    paired_difference,
    percentile_interval,
    resampled_counts,
)

_RESAMPLES_AT_ONCE = 64
_SUMS_AT_ONCE = 1 << 24  # 128 MiB; beyond it images are drawn again for each metric


@dataclass(frozen=True)
class Sample:
    """The part of a run's predictions that its comparison with other runs reads."""

    hashes: np.ndarray  # (n,) str, of the images
    points: list[str]  # see point_name
    metrics: list[dict[str, np.ndarray]]  # of each point: the values of its means over images, (n,) each
    pooled: list[dict[str, Drawn]]  # of each point: its figures that are not means over images, and their resamples

    @classmethod
    def of(cls, predictions: Predictions) -> "Sample":
        """The sample of a run."""
        points = [str(point) for point in predictions.points]
        pooled = _pooled(predictions.task)
        return cls(
            predictions.hashes,
            points,
            [per_image(predictions, i) for i in range(len(points))],
            [
                {metric.key: metric.drawn(predictions, i, metric.resamples) for metric in pooled}
                for i in range(len(points))
            ],
        )


def _pooled(task: str) -> list[PooledMetric]:
    """The compared metrics of a task that are not means over images."""
    return [metric for metric in task_metrics(task) if metric.compared and isinstance(metric, PooledMetric)]


def per_image(predictions: Predictions, point: int) -> dict[str, np.ndarray]:
    """The compared metrics of a point that are means over images: the values of each image, (n,)."""
    metrics = task_metrics(predictions.task)
    means = [metric for metric in metrics if metric.compared and isinstance(metric, MeanOverImages)]
    return {metric.key: metric.per_image(predictions, point) for metric in means}


def compare(
    first: Predictions, i: int, second: Predictions, j: int, *, resamples: int | None = None, seed: int = 0
) -> dict[str, Difference]:
    """How point ``j`` of one run differs from point ``i`` of another, paired image by image.

    Args:
        first, second: runs on the same images in the same order; their points 0 are the unreduced model.
        resamples, seed: of the bootstrap over images. By default each metric has the number of resamples in
            ``mtr_lab.results.resampling``: pooled metrics have fewer than means over images.

    Returns:
        The difference of each compared metric of the task, in its unit in ``result.json``.

    Raises:
        UserError: the runs are on different images, or of different tasks.
    """
    check_same_images(first.hashes, second.hashes)
    if first.task != second.task:
        raise UserError(f"these runs cannot be paired: the tasks are {first.task} and {second.task}.")
    pooled = {
        metric.key: metric.difference(first, i, second, j, resamples=resamples, seed=seed)
        for metric in _pooled(first.task)
    }
    points = [per_image(first, i), per_image(second, j)]
    return compare_all(points, [(0, 1)], resamples=resamples or RESAMPLES, seed=seed)[0] | pooled


def compare_all(
    points: Sequence[dict[str, np.ndarray]],
    pairs: Sequence[tuple[int, int]],
    *,
    runs: Sequence[int] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[dict[str, Difference]]:
    """The differences of many pairs of points, from one drawing of images, which takes most of the time.

    Args:
        points: the same metrics of each point, (n,) values, all on the same images in the same order.
        pairs: (first, second), places in ``points``.
        runs: the number of runs over which the values of each point are summed, to compare the means over runs; by
            default 1.
        resamples, seed: of the bootstrap over images.

    Returns:
        For each pair and metric, second minus first with its paired percentile interval of level 0.95.
    """
    if not pairs or not points[0]:
        return [{} for _ in pairs]
    runs = runs or [1] * len(points)
    compared: list[dict[str, Difference]] = [{} for _ in pairs]
    names = list(points[0])
    at_once = len(names) if resamples * len(points) * len(names) <= _SUMS_AT_ONCE else 1
    for start in range(0, len(names), at_once):
        some = names[start : start + at_once]
        values = np.stack([point[name] for name in some for point in points], axis=1)
        # Sums, not means: sums of hits and misses are exact, so that an interval ends at 0 and not at 1e-17.
        sums = np.ascontiguousarray(_resampled_sums(values, resamples, seed).T).reshape(len(some), len(points), -1)
        for k, name in enumerate(some):
            for (i, j), row in zip(pairs, compared, strict=True):
                m, n = runs[i], runs[j]  # m · n times the difference of the means, without dividing
                resampled = m * sums[k, j] - n * sums[k, i]
                row[name] = _difference(n * points[i][name], m * points[j][name], resampled, m * n)
    return compared


def correct(differences: Sequence[dict[str, Difference]]) -> None:
    """Add ``p_holm`` to the rows of one table of differences: p-values corrected for all its rows, metric by metric."""
    for metric in {name for row in differences for name in row}:
        rows = [row[metric] for row in differences if metric in row]
        for difference, p in zip(rows, holm([difference["p"] for difference in rows]), strict=True):
            difference["p_holm"] = p


def check_same_images(first: np.ndarray, second: np.ndarray, names: str = "these runs") -> None:
    """Raise a ``UserError`` unless the hashes of two runs' images are equal, in the same order."""
    if not np.array_equal(first, second):
        common = len(np.intersect1d(first, second))
        raise UserError(
            f"{names} cannot be paired: {len(first)} and {len(second)} images, {common} of them in "
            "common, or in another order. Evaluate both on the same dataset with the same settings."
        )


def _difference(first: np.ndarray, second: np.ndarray, resampled: np.ndarray, scale: int) -> Difference:
    if np.array_equal(first, second):  # else their sums would differ by rounding
        return paired_difference(0.0, [0.0, 0.0], 1.0)
    interval = [end / len(first) / scale for end in percentile_interval(resampled)]
    difference = float((second - first).mean()) / scale
    hits = scale == 1 and bool(np.isin([first, second], (0, 1)).all())
    p = mcnemar(first, second) if hits else normal_p(difference, resampled / len(first) / scale)
    return paired_difference(difference, interval, p)


def _resampled_sums(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(resamples, m) sums over n rows of (n, m) values drawn with replacement, the same rows for each column."""
    n, m = values.shape
    draws = resampled_counts(n, resamples, seed)
    sums = np.empty((resamples, m))
    counts = np.empty((_RESAMPLES_AT_ONCE, n))
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        chunk = sums[start : start + _RESAMPLES_AT_ONCE]
        for row in counts[: len(chunk)]:
            row[:] = next(draws)
        np.matmul(counts[: len(chunk)], values, out=chunk)
    return sums
