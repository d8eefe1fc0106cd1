"""The course of a run as a file, a table and a picture."""

import csv
import io
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from mtr_lab.training.curve import draw_curve
from mtr_lab.training.history import Row, table, write_csv


def rows(epochs: int) -> list[Row]:
    """Validated in every second epoch."""
    made: list[Row] = []
    for epoch in range(epochs):
        made.append(
            {"epoch": epoch, "step": 3 * epoch + 2, "lr": 1e-3, "img_per_s": 1234.5, "train_loss": 2.0 - epoch / 10}
        )
        if epoch % 2:
            made[-1]["val_top1"] = epoch / 20
    return made


def test_every_epoch_is_a_line_of_the_file(tmp_path: Path) -> None:
    write_csv(rows(4), tmp_path / "metrics.csv")
    read = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["epoch"] for row in read] == ["0", "1", "2", "3"]
    assert [row["val_top1"] for row in read] == ["", "0.05", "", "0.15"]


@pytest.mark.parametrize(("epochs", "shown"), [(1, 1), (8, 8), (17, 8)])
def test_the_table_has_a_few_epochs_and_the_last(epochs: int, shown: int) -> None:
    console = Console(record=True, width=100, file=io.StringIO())
    made = table(rows(epochs), "title")
    console.print(made)
    text = console.export_text()
    assert made.row_count == shown
    assert f" {epochs} " in text
    assert "1234" in text


def test_the_curve_has_a_point_for_every_value(tmp_path: Path) -> None:
    run = rows(6)
    run[2]["train_loss"] = float("nan")
    del run[4]["train_loss"]  # none of its images could be read
    draw_curve(run, tmp_path / "curve.svg")
    svg = ElementTree.parse(tmp_path / "curve.svg")
    lines = svg.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert [len(line.get("points", "").split()) for line in lines] == [4, 3]
    text = "".join(svg.getroot().itertext())
    assert "training loss" in text
    assert "top-1" in text
