"""Models and images where the trainer computes, and in its precision, outside its own loops."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning
from lightning import LightningDataModule
from torch import Tensor, nn


@contextlib.contextmanager
def placed(model: nn.Module, trainer: lightning.Trainer) -> Iterator[Callable[[Tensor], Tensor]]:
    """Move a model to the trainer's device; within the block it computes in the trainer's precision.

    Yields:
        What brings images (B, 3, H, W) to that device and precision.
    """
    device, precision = trainer.strategy.root_device, trainer.precision_plugin
    precision.convert_module(model.to(device))
    with precision.forward_context():
        yield lambda images: precision.convert_input(images.to(device))


def as_input(batch: Mapping[str, Any], datamodule: LightningDataModule, trainer: lightning.Trainer) -> Tensor:
    """The images (B, 3, H, W) of an evaluation batch as the trainer gives them to the model.

    To be called after the trainer has run over some of ``datamodule``'s, which knows it from then on.
    """
    moved = {**batch, "image": batch["image"].to(trainer.strategy.root_device)}
    images: Tensor = datamodule.on_after_batch_transfer(moved, 0)["image"]
    return trainer.precision_plugin.convert_input(images)
