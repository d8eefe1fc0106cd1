"""Passes over the evaluation images, by one process or by several; a sweep runs the unreduced model once."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning
from lightning import LightningDataModule

from mtr_lab.errors import UserError
from mtr_lab.evaluation.budgets import divide, solve_budgets
from mtr_lab.evaluation.job import Job
from mtr_lab.evaluation.placement import placed
from mtr_lab.evaluation.points import operating_points, policy_settings
from mtr_lab.reduction import Reduction, measured_on_images
from mtr_lab.results.predictions import Predictions
from mtr_lab.results.store import UnreducedCache
from mtr_lab.tasks.evaluation import Evaluation, OperatingPoint
from mtr_lab.tasks.ranks import from_rank_zero


class PassResult(NamedTuple):
    """The predictions at all points."""

    predictions: Predictions
    skipped: list[str]
    """Names of the images that could not be read."""
    reused: bool
    """Whether the unreduced model's predictions are those of another job of the sweep."""


def reduced_model(job: Job) -> tuple[Reduction, list[OperatingPoint]]:
    """Patch the job's model; measure ``auto`` and budgets in the trainer's precision.

    Raises:
        UserError: the schedule cannot be solved.
    """
    backbone, settings = job.task.backbone(job.model), policy_settings(job.config.mtr)
    if not measured_on_images(job.config.mtr):
        reduction = Reduction(backbone, settings)
        return reduction, solve_budgets(job, reduction, job.points)
    assert job.calibration is not None
    with placed(backbone, job.trainer) as prepare:
        reduction = Reduction(backbone, settings, images=prepare(divide(job.config.mtr, job.calibration)[0]))
        points = solve_budgets(job, reduction, operating_points(reduction, job.config.mtr))
        reduction.release_images()  # on the device, where the passes and their timing need the memory
        return reduction, points


@contextlib.contextmanager
def releasing_workers() -> Iterator[None]:
    """Release the worker ranks on success; on an error the agent terminates them."""
    yield
    from_rank_zero(None)


def serve_passes(job: Job) -> None:
    """A worker rank's part: run its share of every pass that rank 0 starts, until rank 0 releases it."""
    reduction = Reduction(job.task.backbone(job.model), policy_settings(job.config.mtr))
    evaluation = job.task.evaluation(job.model, reduction, job.points, job.config.trainer.cuda_graph)
    points: list[OperatingPoint] | None
    while (points := from_rank_zero(None)) is not None:
        run_pass(evaluation, points, job.trainer, job.batches)


def run_pass(
    evaluation: Evaluation[Any],
    points: list[OperatingPoint],
    trainer: lightning.Trainer,
    batches: LightningDataModule,
) -> None:
    """Run this process's batches at the points; rank 0's evaluation then holds the results of all processes."""
    evaluation.points = points
    trainer.test(evaluation, datamodule=batches, verbose=False)
    evaluation.gather()


def predict(
    evaluation: Evaluation[Any],
    points: list[OperatingPoint],
    trainer: lightning.Trainer,
    batches: LightningDataModule,
    unreduced: UnreducedCache | None,
) -> PassResult:
    """Run all points, the unreduced model's first, on rank 0.

    In a sweep, the first job runs the unreduced model and stores its predictions in ``unreduced``; the others run the
    reduced points meanwhile, then read them. If the first job fails, another one runs the unreduced model.

    Raises:
        UserError: no image could be read, the model's outputs are not finite, or the images changed between two passes.
    """

    def run(points: list[OperatingPoint]) -> PassResult:
        run_pass(evaluation, from_rank_zero(points), trainer, batches)
        result = PassResult(evaluation.predictions(), evaluation.skipped, reused=False)
        evaluation.release()  # the predictions are a copy
        return result

    if unreduced is None:
        return run(points)
    if unreduced.load() is None:
        with unreduced.try_lock() as locked:
            if locked and unreduced.load() is None:
                complete = run(points)
                unreduced.save(complete.predictions)
                return complete
    reduced = run(points[1:])
    with unreduced.lock:
        stored = unreduced.load()
        if stored is not None and stored.has_images_of(reduced.predictions):
            return PassResult(stored.concat(reduced.predictions), reduced.skipped, reused=True)
        first = run(points[:1]).predictions
        unreduced.save(first)
    if not first.has_images_of(reduced.predictions):
        raise UserError("the images changed while they were evaluated: leave the dataset alone, and run this again.")
    return PassResult(first.concat(reduced.predictions), reduced.skipped, reused=False)
