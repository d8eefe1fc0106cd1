"""Evaluating a model at every operating point: each batch is decoded once and run at all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from lightning import LightningModule
from torch import Tensor, nn

from mtr_lab.errors import UserError
from mtr_lab.reduction import Reduction, Schedule
from mtr_lab.results.predictions import point_name
from mtr_lab.tasks.ranks import Gathering


@dataclass(frozen=True)
class OperatingPoint:
    """A policy at one ratio; ``ratio`` is the asked share of the FLOPs, ``None`` if the counts were given."""

    policy: str
    ratio: float | None
    schedule: Schedule

    @property
    def name(self) -> str:
        return point_name(self.policy, self.ratio)


class Identified(Protocol):
    """What is found in a batch says which images it is of."""

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def hashes(self) -> np.ndarray: ...
    @property
    def skipped(self) -> list[str]:
        """Names of the images that could not be read."""
        ...


Batch = TypeVar("Batch", bound=Identified)


class BatchedEvaluation(LightningModule, Generic[Batch]):
    """Keeps what ``test_step`` finds batch by batch, so that processes can share the batches out.

    Args:
        model: the task's, its backbone patched by ``reduction``.
        reduction: switches between the schedules.
        points: the operating points, the unreduced model first; without any, the images are read and nothing more.

    After ``trainer.test`` and ``gather()``, ``skipped`` holds the names of the images that could not be read, and the
    subclass's ``predictions()`` what was found in all others.
    """

    model: Any

    def __init__(self, model: nn.Module, reduction: Reduction, points: Sequence[OperatingPoint]) -> None:
        super().__init__()
        self.model = model
        self.reduction = reduction
        self.points = points
        self.batches: list[Batch] = []
        self._gathering: Gathering[Batch] | None = None

    @property
    def skipped(self) -> list[str]:
        return [id for batch in self.batches for id in batch.skipped]

    def setup(self, stage: str) -> None:
        """Lightning's hook: in every process, whether or not it has a batch."""
        self.batches, self._gathering = [], Gathering()

    def keep(self, found: Batch) -> None:
        """Take what was found in the next batch, for this process and for rank 0."""
        self.batches.append(found)
        if self._gathering is not None:
            self._gathering.put(found)

    def gather(self) -> None:
        """Bring what all processes have found to rank 0, in the order of the images; the others are left with nothing.

        To be called in every process, after ``trainer.test``.
        """
        assert self._gathering is not None
        self.batches = self._gathering.finish(self.batches)

    def images(self) -> dict[str, np.ndarray]:
        """``ids`` and ``hashes`` of the images that could be read.

        Raises:
            UserError: there is none.
        """
        read = [batch for batch in self.batches if len(batch.ids)]
        if not read:
            raise UserError("not one image could be read: there is nothing to report.")
        ids, hashes = (
            np.concatenate(names) for names in zip(*((batch.ids, batch.hashes) for batch in read), strict=True)
        )
        return {"ids": ids, "hashes": hashes}


def check_finite(outputs: Tensor, point: OperatingPoint) -> None:
    """Raise a ``UserError`` unless all of what a model puts out at a point are numbers."""
    if not outputs.isfinite().all():
        raise UserError(
            f"the model's outputs at {point.name} are infinite or not a number: use another precision "
            "(trainer.precision=32-true), or other weights."
        )
