"""One damaged ``result.json`` beside a good one: the report shows the good one and names the other, or shows both."""

import copy
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz import make_result, read_report
from PIL import Image
from rich.console import Console

from mtr_lab.errors import UserError
from mtr_lab.report.dashboard.reader import Reader
from mtr_lab.report.table import result_table
from mtr_lab.results.predictions_file import load_predictions
from mtr_lab.results.schema import read_result

REFUSED = {
    "no points": lambda result: result.update(points=[]),
    "points of another type": lambda result: result.update(points=[[]]),
    "half a surrogate pair as a name": lambda result: result.update(backbone="\ud800"),
    "half a surrogate pair as a key": lambda result: result["config"].update({"\ud800": 1}),
    "a ratio of 401 digits": lambda result: result["points"][1].update(ratio=10**400),
    "an interval of one end": lambda result: result["points"][1].update(kl_ci=[0.1]),
    "a budget without numbers": lambda result: result["points"][1].update(budget={}),
}
SHOWN = {
    "a metric without its interval": lambda result: result["points"][1].pop("kl_ci"),
    "an interval without an end": lambda result: result["points"][1].update(kl_ci=[None, 0.1]),
    "a point without a metric": lambda result: result["points"][1].pop("kl"),
    "a ratio that is not a number": lambda result: result["points"][1].update(ratio=float("nan")),
    "no token counts": lambda result: result["points"][1].update(tokens=[]),
    "no images": lambda result: result["points"][0].update(images=0),
    "a point twice": lambda result: result["points"].append(result["points"][1]),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (folder := tmp_path / "runs").mkdir()
    return make_result(folder)


def changed(file: Path, change: Callable[[Any], object]) -> None:
    change(result := copy.deepcopy(json.loads(file.read_text())))
    file.write_text(json.dumps(result))


@pytest.mark.parametrize("name", REFUSED)
def test_a_result_that_cannot_be_shown_is_named(file: Path, name: str) -> None:
    changed(file, REFUSED[name])
    with pytest.raises(UserError, match=r"run/result\.json is not a result: "):
        read_report(file)


@pytest.mark.parametrize("text", ["[" * 200_000, "[" * 100_000 + "]" * 100_000, "", "9" * 5000], ids=len)
def test_a_file_that_is_no_result_is_named(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(UserError, match=r"run/result\.json is not a result: "):
        read_report(file)


@pytest.mark.parametrize("name", SHOWN)
def test_a_result_that_lacks_something_is_shown_without_it(file: Path, name: str) -> None:
    changed(file, SHOWN[name])
    read_report(file)
    Console(file=io.StringIO(), width=100).print(result_table(read_result(file)))


@pytest.mark.parametrize("kind", ["too many pixels", "cut", "empty", "no picture"])
def test_a_damaged_picture_is_left_out_and_named(file: Path, kind: str) -> None:
    Image.new("L", (20_000, 20_000) if kind == "too many pixels" else (30, 20)).save(stream := io.BytesIO(), "PNG")
    content = stream.getvalue()
    damaged = {"cut": content[:50], "empty": b"", "no picture": b"text"}
    (file.parent / "pictures").mkdir()
    (file.parent / "pictures" / "a.png").write_bytes(damaged.get(kind, content))
    data = Reader([file.parent.parent]).data()
    (note,) = (note for note in data["notes"] if "a.png" in note)
    assert "a.png is left out because it cannot be read: " in note
    assert " at 0x" not in note
    assert len(data["runs"]) == 2


@pytest.mark.parametrize("kind", ["cut", "pipe", "device"])
def test_predictions_that_are_no_archive(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "predictions.npz"
    if kind == "cut":
        file.write_bytes(b"PK")
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="does not hold predictions: it is not an archive of arrays") as refusal:
        load_predictions(file)
    assert "load it unsafely" not in str(refusal.value)
