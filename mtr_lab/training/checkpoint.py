"""last.ckpt: all that a run needs to go on, written after every epoch, read without running code."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mtr_lab.backbones.checkpoint_file import check_sums
from mtr_lab.errors import UserError
from mtr_lab.results.atomic import replace_file


class PlainCheckpointIO(TorchCheckpointIO):
    """Checkpoints of tensors and plain containers alone, that are complete or what they were before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with replace_file(Path(path)) as stream:
            stream.write(content.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        checkpoint: dict[str, Any] = read_plain(Path(path), map_location)
        return checkpoint


def read_plain(path: Path, map_location: Any = "cpu") -> Any:
    """Read a checkpoint of tensors and plain containers; nothing in it is executed, and its checksums are compared."""
    check_sums(path)
    return torch.load(path, map_location, weights_only=True)


class LastCheckpoint(Checkpoint):
    """Writes a checkpoint at the end of every epoch.

    Args:
        path: of the file.
        settings: what the course of the run depends on; see :func:`check_resume`.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path, self._settings = path, dict(settings)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self._path)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["settings"] = self._settings


def check_resume(checkpoint: str, module: LightningModule, settings: Mapping[str, Any]) -> int:
    """The number of epochs that a checkpoint has finished.

    Raises:
        UserError: the file is not the checkpoint of a run of the same model and settings.
    """
    path = Path(checkpoint)
    if not os.path.isfile(path):  # a name that is too long has no file either
        raise UserError(f"training.resume={path} does not exist: expected the last.ckpt of an earlier run.")
    try:
        loaded = read_plain(path)
        shapes = {key: value.shape for key, value in loaded["current_model_state"].items()}
        before = dict(loaded["settings"])
        finished = int(loaded["epoch"]) + 1
    except Exception as error:  # of damaged or foreign bytes PyTorch raises anything
        raise UserError(f"training.resume={path} is not the last.ckpt of an earlier run: {error!r}.") from error
    expected = {key: value.shape for key, value in module.state_dict().items()}
    if shapes != expected:
        differ = sorted(key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key))
        raise UserError(
            f"training.resume={path} belongs to another model: {len(differ)} parameters differ, such as {differ[0]}. "
            "Give the backbone the geometry, and the dataset the classes, of that run."
        )
    changed = [
        f"{key}={settings.get(key)} (there {before.get(key)})"
        for key in sorted(before.keys() | settings.keys())
        if before.get(key) != settings.get(key)
    ]
    if changed:
        raise UserError(
            f"training.resume={path} belongs to a run with other settings: {', '.join(changed)}. Give the settings of "
            "that run, or start a new one from its weights: backbone.checkpoint=RUN/model.safetensors."
        )
    return finished
