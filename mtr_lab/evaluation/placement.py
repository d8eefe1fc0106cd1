"""Models and images on the trainer's device and in its precision, outside its loops."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning
from torch import Tensor, nn

from mtr_lab.tasks.task import DataModule


@contextlib.contextmanager
def placed(model: nn.Module, trainer: lightning.Trainer) -> Iterator[Callable[[Tensor], Tensor]]:
    """Move a model to the trainer's device; within the block it computes in the trainer's precision.

    Yields:
        A function that converts images (B, 3, H, W) to that device and precision.
    """
    device, precision = trainer.strategy.root_device, trainer.precision_plugin
    precision.convert_module(model.to(device))
    with precision.forward_context():
        yield lambda images: precision.convert_input(images.to(device))


def as_input(batch: Mapping[str, Any], data: DataModule, trainer: lightning.Trainer) -> Tensor:
    """The images (B, 3, H, W) of an evaluation batch, as the trainer gives them to the model."""
    data.trainer = trainer  # its hook reads the precision
    on_device = {**batch, "image": batch["image"].to(trainer.strategy.root_device)}
    images: Tensor = data.on_after_batch_transfer(on_device, 0)["image"]
    return trainer.precision_plugin.convert_input(images)
