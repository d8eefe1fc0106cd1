"""The axes of the trade-off and the facets of its points, beside the metrics: what the dashboard and loggers show."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from mtr_lab.results.metrics import all_metrics


@dataclass(frozen=True)
class Axis:
    """A cost or a speed of a point."""

    key: str
    title: str
    unit: str
    scale: float
    """What a value in a result is multiplied by for ``unit``."""
    better: Literal[1, -1]
    """1 if more is better, -1 if less is."""
    relative: bool = False
    """Whether it is relative to the unreduced model of the same backbone."""


COSTS = (
    Axis("flops_true", "True GFLOPs per image", "GFLOPs", 1e-9, -1),
    Axis("flops_literature", "GFLOPs per image as the literature counts them", "GFLOPs (lit.)", 1e-9, -1),
    Axis("reduction", "FLOPs removed, %", "% removed", 100, 1),
)
SPEEDS = (
    Axis("speedup", "Speed, × unreduced in the same run", "× unreduced", 1, 1, relative=True),
    Axis("img_per_s", "Images per second", "img/s", 1, 1),
    Axis("latency_p50", "Latency of one image, median, ms", "ms", 1, -1),
    Axis("latency_p95", "Latency of one image, 95th percentile, ms", "ms (p95)", 1, -1),
    Axis("peak_mib", "Peak memory, MiB", "MiB", 1, -1),
)
FACETS = {
    "task": "Task",
    "backbone": "Backbone",
    "dataset": "Dataset",
    "hardware": "Hardware",
    "policy": "Policy",
    "ratio": "Asked ratio",
}
"""The properties by which the dashboard filters points, and their names."""

_DECLARED = ("key", "name", "axis", "latex", "unit", "better", "relative", "compared")


def axes() -> dict[str, Any]:
    """Metrics, costs, speeds and facets as JSON, for the dashboard's script."""
    return {
        "metrics": [{name: getattr(metric, name) for name in _DECLARED} for metric in all_metrics()],
        "costs": [asdict(axis) for axis in COSTS],
        "speeds": [asdict(axis) for axis in SPEEDS],
        "facets": [{"key": key, "name": name} for key, name in FACETS.items()],
    }
