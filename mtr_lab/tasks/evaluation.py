"""Evaluation of a model at several operating points: every batch is decoded once and run at all of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor, nn

from mtr_lab.errors import UserError
from mtr_lab.reduction import Budget, Reduction, Schedule
from mtr_lab.results.predictions import Predictions, point_name
from mtr_lab.tasks.ranks import Gathering, of_all_ranks


@dataclass(frozen=True)
class OperatingPoint:
    """A policy at one ratio: the share of the FLOPs to remove, ``None`` where counts or another budget were given."""

    policy: str
    ratio: float | None
    schedule: Schedule
    budget: Budget | None = None

    @property
    def name(self) -> str:
        budget = None if self.budget is None else asdict(self.budget)
        return point_name(self.policy, self.ratio, self.schedule.resolution, budget)

    @property
    def words(self) -> str:
        """The point as a reader calls it: "unreduced", or the policy and the share of FLOPs that it removes."""
        if self.policy == "none":
            return "unreduced"
        return f"{self.policy}, {100 * self.schedule.reduction:.0f} % fewer FLOPs"


class BatchResults(Protocol):
    """What a batch's images were evaluated to, at every point; subclasses add the predictions."""

    @property
    def ids(self) -> np.ndarray:
        """Names of the B images, (B,) str."""
        ...

    @property
    def hashes(self) -> np.ndarray:
        """Of the files' contents, (B,) str."""
        ...

    @property
    def skipped(self) -> list[str]:
        """Names of the images that could not be read."""
        ...


Results = TypeVar("Results", bound=BatchResults)
Output = TypeVar("Output")


class Evaluation(LightningModule, ABC, Generic[Results]):
    """Runs a model on every batch at every operating point, and collects the results of all processes on rank 0.

    After ``trainer.test`` and ``gather()``, ``predictions()`` and ``skipped`` cover all images, on rank 0.

    Args:
        model: the task's, its backbone patched by ``reduction``.
        reduction: switches between the schedules.
        points: the operating points of the next pass, the unreduced model's first. They may be replaced between two
            passes. Without points the images are only read.
    """

    model: Any

    def __init__(self, model: nn.Module, reduction: Reduction, points: Sequence[OperatingPoint]) -> None:
        super().__init__()
        self.model = model
        self.reduction = reduction
        self.points = points
        self.results: list[Results] = []
        """Of the batches of all processes, in their order; on rank 0."""
        self.batch_size: int | None = None
        """The number of images that the device had memory for at once; ``None`` if that is every batch."""
        self.watch: Callable[[int], None] = lambda place: None
        """Told the place of every point that a batch is run at, when it begins."""
        self._gathering: Gathering[Results] = Gathering(
            self.receive, alone=True
        )  # ``setup`` makes that of a trainer's processes

    @abstractmethod
    def forward_at(self, point: OperatingPoint, images: Tensor) -> object:
        """Images (B, 3, H, W) of the model's input size to its outputs at one point; this call is timed."""

    @abstractmethod
    def test_step(self, batch: Mapping[str, Any], index: int) -> None:
        """Lightning's hook: run a batch at ``points`` and ``keep`` the results."""

    @abstractmethod
    def predictions(self) -> Predictions:
        """The predictions for every image that could be read, at every point.

        Raises:
            UserError: no image could be read, or the model's outputs are not finite.
        """

    @property
    def skipped(self) -> list[str]:
        """Names of the images that could not be read."""
        return [name for results in self.results for name in results.skipped]

    def setup(self, stage: str) -> None:
        """Lightning's hook: every process calls it, with or without a batch."""
        self.results, self._gathering = [], Gathering(self.receive)

    def points_in_turn(self) -> Iterator[OperatingPoint]:
        """The points; ``watch`` follows."""
        for place, point in enumerate(self.points):
            self.watch(place)
            yield point

    def keep(self, results: Results) -> None:
        """Send the results of the next batch to rank 0."""
        self._gathering.put(results)

    def receive(self, results: Results) -> None:
        """Store the results of the next batch of all processes, on rank 0."""
        self.results.append(results)

    def in_parts(self, run: Callable[[slice], Output], images: int) -> list[Output]:
        """Call ``run`` for a whole batch or, if the device has no memory for it, for its halves, quarters, ….

        Later batches are divided alike.

        Args:
            run: called with the places of the images to run.
            images: their number in the batch.

        Raises:
            torch.OutOfMemoryError: the device has no memory for a single image.
        """
        while True:
            size = min(images, self.batch_size or images)
            try:
                return [run(slice(start, start + size)) for start in range(0, images, size)]
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            # Not in the handler: until it ends, the error's traceback keeps the tensors of the failed call.
            torch.cuda.empty_cache()
            self.batch_size = -(-size // 2)
            print(f"out of memory at {size} images at once: continuing with {self.batch_size}", flush=True)

    def gather(self) -> None:
        """Wait for the results of all processes on rank 0, which are in the order of the images.

        Every process has to call it, after ``trainer.test``.
        """
        self._gathering.finish()
        self.batch_size = min(filter(None, of_all_ranks(self.batch_size)), default=None)

    def release(self) -> None:
        """Free the results of the last pass."""
        self.results, self._gathering = [], Gathering(self.receive, alone=True)

    def image_names(self) -> dict[str, np.ndarray]:
        """``ids`` and ``hashes`` of the images that could be read.

        Raises:
            UserError: no image could be read.
        """
        read = [results for results in self.results if len(results.ids)]
        if not read:
            raise UserError("no image could be read: there is nothing to report.")
        ids, hashes = (np.concatenate(names) for names in zip(*((r.ids, r.hashes) for r in read), strict=True))
        return {"ids": ids, "hashes": hashes}


def check_finite(outputs: Tensor, point: OperatingPoint) -> None:
    """Raise a ``UserError`` unless all outputs of the model at a point, a tensor of any shape, are finite."""
    if not outputs.isfinite().all():
        raise UserError(
            f"the model's outputs at {point.name} are infinite or not a number: use another precision "
            "(trainer.precision=32-true), or other weights."
        )
