"""What a metric declares, and how its value, its interval and its paired difference are computed."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from mtr_lab.measure.statistics import wilson_interval
from mtr_lab.results.resampling import Difference, normal_p, paired_difference, percentile_interval


@dataclass(frozen=True, kw_only=True)
class Metric(ABC):
    """A figure of a point, computed from the predictions of its task: a mean over images, or a pooled figure."""

    key: str
    """Name in ``result.json``; the interval is ``KEY_ci``."""
    task: str
    """The task whose predictions it reads."""
    also: tuple[str, ...] = field(default=(), kw_only=True)
    """Other tasks whose predictions it reads."""
    order: int
    """Place in tables and charts. The first of a task that is not ``relative`` is the task's accuracy."""
    name: str
    """Name in legends and headings."""
    heading: str
    """Name in the narrow columns of a terminal."""
    axis: str
    """Title of an axis, with the unit."""
    latex: str
    """Heading of a LaTeX column, with the unit."""
    unit: Literal["%", "nats"]
    """``%``: a fraction in files, shown in percent."""
    better: Literal[1, -1]
    """1 if more is better, -1 if less is."""
    relative: bool = False
    """Whether it measures the distance to the unreduced model of the same backbone."""
    compared: bool = True
    """Whether points are compared by it in pairs."""

    @property
    def keys(self) -> list[str]:
        """Its figures in ``result.json``, each of which has an interval."""
        return [self.key]

    @abstractmethod
    def score(self, predictions: Any, point: int) -> dict[str, Any]:
        """The figures of a point and their intervals of level 0.95, [lo, hi], by their keys in ``result.json``."""


@dataclass(frozen=True, kw_only=True)
class MeanOverImages(Metric):
    """A mean over images; two points differ by the mean of the images' differences."""

    per_image: Callable[[Any, int], np.ndarray]
    """(predictions, point) to the value of each image, (n,) float64."""
    mean_interval: Callable[[np.ndarray], tuple[float, float]]
    """The interval of the mean of (n,) values."""

    def score(self, predictions: Any, point: int) -> dict[str, Any]:
        values = self.per_image(predictions, point)
        mean = float(values.mean())
        certain = self.relative and point == 0  # the unreduced model's distance to itself
        return {self.key: mean, f"{self.key}_ci": [mean, mean] if certain else list(self.mean_interval(values))}


def share_interval(hits: np.ndarray) -> tuple[float, float]:
    """The Wilson interval of a share, from (n,) values that are 0 or 1."""
    return wilson_interval(int(hits.sum()), len(hits))


@dataclass(frozen=True, kw_only=True)
class PooledMetric(Metric):
    """A figure of all images together that is not a mean over them; images are resampled for its interval."""

    value: Callable[[Any, int], float]
    """(predictions, point) to the figure."""
    resampled: Callable[[Any, int, int, int], np.ndarray]
    """(predictions, point, resamples, seed) to the figure of each resample, (resamples,); all points with the same
    images draw the same ones."""
    resamples: int
    """The number of resamples, unless a comparison asks for another."""
    difference_in_result: bool = False
    """Whether a result has ``KEY_difference`` too, the paired difference to its unreduced model."""

    @property
    def keys(self) -> list[str]:
        return [self.key, *([f"{self.key}_difference"] if self.difference_in_result else [])]

    def score(self, predictions: Any, point: int) -> dict[str, Any]:
        interval = percentile_interval(self.resampled(predictions, point, self.resamples, 0))
        score: dict[str, Any] = {self.key: self.value(predictions, point), f"{self.key}_ci": interval}
        if self.difference_in_result:
            change = self.difference(predictions, 0, predictions, point)
            score |= {f"{self.key}_difference": change["difference"], f"{self.key}_difference_ci": change["ci"]}
        return score

    def difference(
        self, first: Any, i: int, second: Any, j: int, *, resamples: int | None = None, seed: int = 0
    ) -> Difference:
        """How point ``j`` of ``second`` differs from point ``i`` of ``first``, on the same images."""
        drawn = (self.resamples if resamples is None else resamples, seed)
        return self.drawn(second, j, *drawn).minus(self.drawn(first, i, *drawn))

    def drawn(self, predictions: Any, point: int, resamples: int, seed: int = 0) -> "Drawn":
        """The figure of a point, and of its resamples."""
        return Drawn(self.value(predictions, point), self.resampled(predictions, point, resamples, seed))


class Drawn(NamedTuple):
    """A pooled figure and those of its resamples, (resamples,); points with the same images draw the same ones."""

    value: float
    resampled: np.ndarray

    def minus(self, first: "Drawn") -> Difference:
        """How it differs from the figure of another point, paired resample by resample."""
        difference, resampled = self.value - first.value, self.resampled - first.resampled
        return paired_difference(difference, percentile_interval(resampled), normal_p(difference, resampled))
