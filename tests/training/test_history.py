"""The course of a run as a file, a table and a picture."""

import csv
import io
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from lightning import LightningModule, Trainer
from rich.console import Console
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

from mtr_lab.training.curve import draw_curve
from mtr_lab.training.history import History, Row, TrainingBar, table, write_csv


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


class Halving(LightningModule):
    """The learning rate 1, 1/2, 1/4, … of its steps; an epoch may end before its last batch."""

    def __init__(self, stop_after: int | None) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.skipped: set[str] = set()
        self._stop_after = stop_after

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
        return -1 if batch_idx == self._stop_after else None  # Lightning ends the epoch

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss: Tensor = self.layer(batch).sum()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": ExponentialLR(optimizer, 0.5), "interval": "step"},
        }


@pytest.mark.parametrize(("stop_after", "steps"), [(None, 4), (2, 2)])
def test_the_learning_rate_is_that_of_the_last_step(tmp_path: Path, stop_after: int | None, steps: int) -> None:
    history = History(tmp_path, batch_size=2)
    bar = TrainingBar(history)
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, callbacks=[history, bar]
    )
    model = Halving(stop_after)
    trainer.fit(model, DataLoader(torch.ones(8, 1), batch_size=2))
    assert history.rows[0]["lr"] == 0.5 ** (steps - 1)
    assert bar.get_metrics(trainer, model)["lr"] == f"{0.5 ** (steps - 1):.1e}"
