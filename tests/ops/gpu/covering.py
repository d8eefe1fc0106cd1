"""Covering arrays: few combinations of options in which any two values of different options occur together."""

from itertools import combinations, product
from typing import Any

import pytest
import torch


def covering_array(*options: list, strength: int) -> list[tuple]:
    """Combinations of one value an option, such that any ``strength`` values of different options occur together.

    Greedy: the next row is the first of those that cover most of the missing combinations.
    """
    met = {row: set(combinations(enumerate(row), strength)) for row in product(*(range(len(o)) for o in options))}
    missing = set().union(*met.values())
    rows = []
    while missing:
        rows.append(max(met, key=lambda row: len(met[row] & missing)))
        missing -= met[rows[-1]]
    return [tuple(option[i] for option, i in zip(options, row, strict=True)) for row in rows]


def parametrize_covering(indirect: list[str] | None = None, **options: list) -> Any:
    """``pytest.mark.parametrize`` over a covering array of strength 2; 3 on a GPU."""
    rows = covering_array(*options.values(), strength=3 if torch.cuda.is_available() else 2)
    return pytest.mark.parametrize(list(options), rows, indirect=indirect or [])
