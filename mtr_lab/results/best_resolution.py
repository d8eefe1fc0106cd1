"""A model's best test resolution: the size of the picture at which it is most accurate without any reduction."""

from collections.abc import Mapping, Sequence
from typing import Any

from mtr_lab.results.metrics import accuracy


def best_resolution(points: Sequence[Mapping[str, Any]]) -> str | None:
    """The best of the sizes at which the whole model was evaluated, as a line; ``None`` if there is only its own.

    Args:
        points: of one model on one set of images, the unreduced model's first.
    """
    whole: list[dict[str, Any]] = [dict(point) for point in points[1:] if "resolution" in point]
    sizes = {tuple(point["resolution"]): point for point in whole if point["flops_overhead"] == 0}
    whole = [dict(points[0]), *sizes.values()]
    metric = accuracy(whole)
    if metric is None or len(whole) == 1 or any(point.get(metric.key) is None for point in whole):
        return None
    best = max(whole, key=lambda point: metric.better * point[metric.key])
    size = " × ".join(map(str, best["resolution"])) + " px" if "resolution" in best else "the model's own"
    return f"best test resolution of {len(whole)}: {size}, {metric.name} {100 * best[metric.key]:.1f} % on these images"
