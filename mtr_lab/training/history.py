"""The course of a run: one row per epoch, in metrics.csv, as a picture and as the table at the end."""

import csv
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from rich.table import Table

from mtr_lab.results.atomic import replace_file

Row = dict[str, float]
TABLE_ROWS = 8


class History(Callback):
    """Collects loss, metrics, learning rate and images per second of every epoch, those before a resume included.

    ``rows`` has one row per epoch: ``epoch`` from 0, ``step``, ``lr`` of the last step, ``img_per_s`` without
    validation, and what the module has logged. Rank 0 writes them to ``folder/metrics.csv`` after every epoch.

    Args:
        folder: of the run.
        batch_size: images in a step, on all devices together.

    Attributes:
        learning_rate: of the last step.
    """

    def __init__(self, folder: Path, batch_size: int) -> None:
        self.rows: list[Row] = []
        self._folder, self._batch_size = folder, batch_size
        self._start, self._seconds, self._validated = 0.0, 0.0, False
        self.learning_rate = 0.0

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.learning_rate = float(optimizer.param_groups[0]["lr"])  # after the step it is the next one's

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seconds, self._validated = 0.0, False
        self._start = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = True
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(trainer)
        logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
        fresh = {name: value for name, value in logged.items() if self._validated or not name.startswith("val_")}
        images = trainer.num_training_batches * self._batch_size
        self.rows.append(
            {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step - 1,
                "lr": self.learning_rate,
                "img_per_s": images / self._seconds,
                **dict(sorted(fresh.items())),
            }
        )
        if trainer.is_global_zero:
            write_csv(self.rows, self._folder / "metrics.csv")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"], checkpoint["skipped"] = self.rows, sorted(pl_module.skipped)  # type: ignore[arg-type]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.rows = checkpoint["history"]
        pl_module.skipped.update(checkpoint["skipped"])  # type: ignore[operator, union-attr]

    def _stop(self, trainer: Trainer) -> None:
        """Count the time until the device has done what it was given."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds += time.perf_counter() - self._start


class TrainingBar(TQDMProgressBar):
    """Lightning's progress bar with the loss and the learning rate of the last step.

    It is drawn every 20 steps, since reading the loss waits for the device.

    Args:
        history: of the same run, for the learning rate.
    """

    def __init__(self, history: History) -> None:
        super().__init__(refresh_rate=20)
        self._history = history
        self._loss: torch.Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._loss = outputs["loss"] if outputs else self._loss
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        loss = {} if self._loss is None else {"loss": f"{self._loss.item():.3f}"}
        return {**loss, **metrics, "lr": f"{self._history.learning_rate:.1e}"}


def last_values(rows: Sequence[Row]) -> Row:
    """The last value of everything that was logged."""
    return {name: value for row in rows for name, value in row.items()}


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """A column a name; empty where an epoch has no value."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(last_values(rows)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replace_file(path) as stream:
        stream.write(text.getvalue().encode())


def table(rows: Sequence[Row], title: str) -> Table:
    """At most ``TABLE_ROWS`` of the epochs, evenly spread, the last among them."""
    names = [name for name in last_values(rows) if name != "step"]
    made = Table(title=title, title_justify="left")
    for name in names:
        made.add_column(name, justify="right")
    count = min(len(rows), TABLE_ROWS)
    for row in [rows[len(rows) * (i + 1) // count - 1] for i in range(count)]:
        made.add_row(*(_cell(name, row) for name in names))
    return made


def _cell(name: str, row: Mapping[str, float]) -> str:
    if name not in row:
        return ""
    if name == "epoch":
        return f"{row[name] + 1:.0f}"
    if name in ("lr", "img_per_s"):
        return f"{row[name]:.3g}" if row[name] < 100 else f"{row[name]:.0f}"
    return f"{row[name]:.4f}"
