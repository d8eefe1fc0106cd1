"""Damaged files, and lines mistyped badly: a message, or a value; never a traceback or a hang. See ``fuzz``."""

from pathlib import Path

import pytest
from fuzz import TARGETS, fuzz, fuzz_overrides

COUNTS = pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])


@COUNTS
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_refused_or_read(tmp_path: Path, name: str, count: int) -> None:
    (folder := tmp_path / "a").mkdir()
    assert fuzz(name, count, folder)["refused"] > count // 10


@COUNTS
def test_a_mistyped_line_is_refused_or_composed(count: int) -> None:
    outcomes = fuzz_overrides(count)
    assert outcomes["refused"] > count // 2
    assert outcomes["composed"] > count // 20
