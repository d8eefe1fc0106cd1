"""A YAML file of the user's is read as it is written, or refused in one line that names the file and the line."""

import time
from pathlib import Path

import pytest

from mtr_lab.cli.program import compose
from mtr_lab.errors import UserError
from mtr_lab.plain_yaml import read_yaml

LAUGHS = "a0: &a0 [1, 1, 1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


def test_values_are_read_as_they_are_written(tmp_path: Path) -> None:
    (file := tmp_path / "a.yaml").write_text(
        "a: &b [10, -1.5, 0, 0.25, true, false, null, 0x1f]\nb: *b\n"
        "'c': '1_0'\nd: \"010\"\ne: v1_0\nf: 'no'\ng: |\n  no\n"
    )
    values = [10, -1.5, 0, 0.25, True, False, None, 31]
    assert read_yaml(file) == {"a": values, "b": values, "c": "1_0", "d": "010", "e": "v1_0", "f": "no", "g": "no\n"}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: 1_0\n", 2, "1_0 would be read as 10. Write that"),
        ("a: 0.1_5\n", 1, "0.1_5 would be read as 0.15"),
        ("a: [1, -1_000e3]\n", 1, "-1_000e3 would be read"),
        ("a: 010\n", 1, "010 would be read as 8"),
        ("a: 1:30\n", 1, "1:30 would be read as 90"),
        ("a: [no]\n", 1, "no would be read as false"),
        ("1_0: a\n", 1, "1_0 would be read as 10"),
        ("a: 1\nb: 2\na: 3\n", 3, "the key 'a' occurs a second time"),
        ("a:\n  b: 1\n  b: 1\n", 3, "the key 'b' occurs a second time"),
        ("a: 1\n---\nb: 2\n", 2, "several documents"),
        ("a: 1\n b: 2\n", 2, "mapping values are not allowed"),
        ("a: 1\n\tb: 2\n", 2, "cannot start any token"),
        ("a: !!python/object:os.system 1\n", 1, "constructor for the tag"),
        ("a: &a [*a]\n", 1, "with its aliases"),
        (LAUGHS, None, "with its aliases"),
        ("a: [\n", None, "expected the node content"),
        ("? [a, b]\n: 1\n", 1, "unhashable key"),
    ],
)
def test_other_values_are_refused(tmp_path: Path, text: str, line: int | None, message: str) -> None:
    (file := tmp_path / "a.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        read_yaml(file)
    place = f"{file}, line " if line is None else f"{file}, line {line} is not plain YAML: "
    assert str(caught.value).startswith(place)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ("[nosuch, _self_]", "the defaults of reduction/mine.yaml name reduction/nosuch.yaml, which does not exist"),
        ("[mine, _self_]", "maximum recursion depth"),
        ("[mtr, 3]", "reduction=mine: Unsupported type in defaults"),
        ("nosuch", "reduction=mine: Invalid defaults list"),
    ],
)
def test_defaults_that_name_nothing(tmp_path: Path, defaults: str, message: str) -> None:
    (tmp_path / "reduction").mkdir()
    (tmp_path / "reduction" / "mine.yaml").write_text(f"# @package mtr\ndefaults: {defaults}\nscore: b\n")
    with pytest.raises(UserError, match=message) as caught:
        compose("config", ["reduction=mine"], tmp_path)
    assert len(str(caught.value).splitlines()) == 1
