"""Dataclasses of arrays, as ``predictions.npz`` holds them: their shapes, and one after another."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

Arrays = TypeVar("Arrays", bound=Any)


def check_shapes(arrays: object, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check the fields of ``arrays`` that ``expected`` names.

    Raises:
        ValueError: one is of another shape.
    """
    for name, shape in expected.items():
        if getattr(arrays, name).shape != shape:
            raise ValueError(f"expected {name} of shape {shape}, got {getattr(arrays, name).shape}")


def concat_fields(first: Arrays, second: Arrays, fields: Iterable[str]) -> Arrays:
    """``first`` with, in these fields, the entries of ``second`` after its own along the first dimension."""
    joined = {name: np.concatenate([getattr(first, name), getattr(second, name)]) for name in fields}
    return replace(first, **joined)
