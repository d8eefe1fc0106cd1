"""Damaged files, and lines mistyped badly: a message, or a value; never a traceback or a hang. See ``fuzz``."""

from pathlib import Path

import pytest
from fuzz import TARGETS, fuzz, fuzz_overrides


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_refused_or_read(tmp_path: Path, name: str) -> None:
    (folder := tmp_path / "a").mkdir()
    assert fuzz(name, 2000, folder)["refused"] > 100


def test_a_mistyped_line_is_refused_or_composed() -> None:
    outcomes = fuzz_overrides(200)
    assert outcomes["refused"] > 100
    assert outcomes["composed"] > 10
