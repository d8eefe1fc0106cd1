"""What a model predicts for every image at every point: the fields that all tasks share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np


@dataclass(frozen=True, eq=False)
class Predictions:
    """Arrays of n images at p points; a task's subclass adds what its model predicts.

    Point 0 is the unreduced model, as in ``result.json``.
    """

    task: ClassVar[str]
    of_points: ClassVar[tuple[str, ...]]
    """The subclass's fields whose first dimension is that of the points."""

    ids: np.ndarray  # (n,) str, the image's name within its dataset
    hashes: np.ndarray  # (n,) str, of the image file's content
    labels: np.ndarray  # (n, …) the truth
    points: np.ndarray  # (p,) str, see point_name

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise a ``ValueError`` unless these fields have these shapes."""
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"expected {name} of shape {shape}, got {getattr(self, name).shape}")

    def select(self, points: slice) -> Self:
        """The same images at some of the points."""
        return replace(self, **{name: getattr(self, name)[points] for name in ("points", *self.of_points)})

    def concat(self, other: Self) -> Self:
        """The same images at the points of both, those of ``other`` last.

        Raises:
            ValueError: the images of ``other`` are not the same, or not in the same order.
        """
        if not self.has_images_of(other):
            raise ValueError("expected predictions for the same images in the same order")
        fields = ("points", *self.of_points)
        return replace(self, **{name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in fields})

    def has_images_of(self, other: "Predictions") -> bool:
        """Whether both are for the same images, with the same labels, in the same order."""
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in ("ids", "hashes", "labels"))


def point_name(
    policy: str,
    ratio: float | None,
    resolution: Sequence[int] | None = None,
    budget: Mapping[str, Any] | None = None,
) -> str:
    """Name a point, "mtr@0.4", with another budget "mtr@speedup=1.5"; "none@0" is the unreduced model.

    A point without either is named by its policy and, if the picture was resized, by its size, "resolution@96x96".
    """
    if budget is not None:
        return f"{policy}@{budget['key']}={budget['asked']:g}"
    if ratio is not None:
        return f"{policy}@{ratio:g}"
    return policy if resolution is None else f"{policy}@{'x'.join(map(str, resolution))}"


def name_of(point: Mapping[str, Any]) -> str:
    """The name of a point of a result."""
    return point_name(point["policy"], point["ratio"], point.get("resolution"), point.get("budget"))
