"""Passes over the images of an evaluation, by one process or by several, the unreduced model's once a sweep."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import lightning
from lightning import LightningDataModule
from omegaconf import DictConfig
from torch import nn

from mtr_lab.errors import UserError
from mtr_lab.reduction import Reduction
from mtr_lab.results.predictions import Predictions
from mtr_lab.results.store import UnreducedCache
from mtr_lab.tasks.evaluation import OperatingPoint
from mtr_lab.tasks.ranks import from_rank_zero
from mtr_lab.tasks.task import Evaluation, Task


class PassResult(NamedTuple):
    """The predictions at all points, the images that could not be read, whether the unreduced model's were at hand."""

    predictions: Predictions
    skipped: list[str]
    reused: bool


EvaluationMaker: TypeAlias = Callable[[list[OperatingPoint]], Evaluation]


def make_evaluations(task: Task, model: nn.Module, settings: dict[str, Any], config: DictConfig) -> EvaluationMaker:
    """From operating points to the evaluation of the task's ``model``, which is patched, at them."""
    reduction = Reduction(task.backbone(model), settings)
    return partial(task.evaluation, model, reduction, cuda_graph=config.trainer.cuda_graph)


@contextlib.contextmanager
def lead() -> Iterator[None]:
    """Release the worker ranks on success; on an error the agent terminates them."""
    yield
    from_rank_zero(None)


def serve_passes(make_evaluation: EvaluationMaker, trainer: lightning.Trainer, batches: LightningDataModule) -> None:
    """Do this process's share of every pass that rank 0 begins, until it has ended."""
    points: list[OperatingPoint] | None
    while (points := from_rank_zero(None)) is not None:
        run_pass(make_evaluation(points), trainer, batches)


def run_pass(evaluation: Any, trainer: lightning.Trainer, batches: LightningDataModule) -> None:
    """Run over the images; rank 0's evaluation then holds what was found, in their order."""
    trainer.test(evaluation, datamodule=batches, verbose=False)
    evaluation.gather()


def predict(
    points: list[OperatingPoint],
    make_evaluation: EvaluationMaker,
    trainer: lightning.Trainer,
    batches: LightningDataModule,
    unreduced: UnreducedCache | None,
) -> PassResult:
    """Run all points, the first of which is the unreduced model: one point of a sweep runs it for all of them.

    While another process computes it the reduced points are run; if that process fails, it is run here after all.
    """

    def run(points: list[OperatingPoint]) -> PassResult:
        evaluation = make_evaluation(from_rank_zero(points))
        run_pass(evaluation, trainer, batches)
        return PassResult(evaluation.predictions(), evaluation.skipped, False)

    if unreduced is None:
        return run(points)
    if unreduced.load() is None:
        with unreduced.try_lock() as mine:
            if mine and unreduced.load() is None:
                found = run(points)
                unreduced.save(found.predictions)
                return found
    reduced = run(points[1:])
    with unreduced.lock:
        stored = unreduced.load()
        if stored is not None and stored.has_images_of(reduced.predictions):
            return PassResult(stored.concat(reduced.predictions), reduced.skipped, True)
        alone = run(points[:1]).predictions
        unreduced.save(alone)
    if not alone.has_images_of(reduced.predictions):
        raise UserError("the images changed while they were evaluated: leave the dataset alone, and run this again.")
    return PassResult(alone.concat(reduced.predictions), reduced.skipped, False)
