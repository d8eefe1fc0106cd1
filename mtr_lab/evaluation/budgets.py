"""Budgets besides the ratio in an evaluation: what can be checked before weights are loaded, and their solution."""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig
from torch import Tensor

from mtr_lab.errors import UserError
from mtr_lab.evaluation.placement import placed
from mtr_lab.evaluation.points import asked_budgets
from mtr_lab.evaluation.timing import timing_images
from mtr_lab.reduction import MAX_DROP, SPEEDUP, Reduction, measured_on_images
from mtr_lab.reduction.budgets import (
    SEARCH_IMAGES,
    check_images,
    images_needed,
    is_for_search,
    solve_max_drop,
    solve_speedup,
)
from mtr_lab.reduction.cost_table import CostTable, cost_table
from mtr_lab.tasks.classification.task import Classification
from mtr_lab.tasks.evaluation import OperatingPoint
from mtr_lab.tasks.task import AnyTask

if TYPE_CHECKING:
    from mtr_lab.evaluation.job import Job  # imports all tasks

DROP_IMAGES = 1024
"""The number of training images that a drop is measured on, more if its proof needs more."""


def check_budgets(task: AnyTask, config: DictConfig) -> None:
    """Raise a ``UserError`` if the budget of the ``mtr`` group cannot be measured under these settings."""
    key, _ = asked_budgets(config.mtr) or ("", [])
    if key and not isinstance(config.mtr.schedule, str):
        raise UserError(
            f"mtr.schedule gives the counts itself: leave mtr.{key} out, or name a schedule, such as constant."
        )
    if key == SPEEDUP and not config.timing.batch_size:
        raise UserError(
            "mtr.speedup is measured at timing.batch_size, which is 0: set it to the number of images per batch."
        )
    if key == SPEEDUP and config.trainer.cuda_graph:
        raise UserError(
            "mtr.speedup is solved from times without CUDA graphs: set trainer.cuda_graph=false, or give mtr.ratio."
        )
    if key == MAX_DROP and not isinstance(task, Classification):
        raise UserError(
            f"mtr.max_drop bounds the share of images that change class, and task={task.name} gives images "
            "no class: give mtr.ratio."
        )


def calibration_count(settings: DictConfig) -> int:
    """The number of calibration images to read; 0 if none are needed."""
    search = SEARCH_IMAGES if measured_on_images(settings) else 0
    key, asked = asked_budgets(settings) or ("", [])
    return search + max(DROP_IMAGES, 2 * images_needed(min(asked))) if key == MAX_DROP else search


def divide(settings: DictConfig, images: Tensor) -> tuple[Tensor, Tensor]:
    """The calibration images that a schedule is measured on, and those that a drop is measured on.

    Raises:
        UserError: a drop cannot be proven on its images.
    """
    key, asked = asked_budgets(settings) or ("", [])
    if key != MAX_DROP:
        return images, images[:0]
    chosen = is_for_search(len(images)) & torch.tensor(bool(measured_on_images(settings)))
    check_images(len(images) - int(chosen.sum()), min(asked))
    return images[chosen], images[~chosen]


def solve_budgets(job: "Job", reduction: Reduction, points: list[OperatingPoint]) -> list[OperatingPoint]:
    """The points, with the schedules of budgets solved on the job's device, in the trainer's precision.

    Args:
        reduction: the handle of the job's patched model.
        points: see ``operating_points``, the unreduced model's first.

    Raises:
        UserError: a budget is out of reach.
    """
    key, _ = asked_budgets(job.config.mtr) or ("", [])
    if not key:
        return points
    with placed(job.model, job.trainer) as prepare, torch.no_grad():
        if key == MAX_DROP:
            assert job.calibration is not None
            images = divide(job.config.mtr, job.calibration)[1]
            solve = partial(solve_max_drop, reduction, images=images, prepare=prepare)
        else:
            solve = partial(solve_speedup, reduction, table=_table(job, reduction, points[0]))
        solved = [points[0]]
        for point in points[1:]:
            assert point.budget is not None
            schedule, budget = solve(asked=point.budget.asked)
            solved.append(replace(point, schedule=schedule, budget=budget))
        return solved


def _table(job: "Job", reduction: Reduction, unreduced: OperatingPoint) -> CostTable:
    """The cost table of the task's model on the images that it will be timed on."""
    images = timing_images(job)
    evaluation = job.task.evaluation(job.model, reduction, [unreduced], False)

    def whole() -> object:
        return evaluation.forward_at(replace(unreduced, schedule=reduction.schedule), images)

    inputs = images.flatten(0, 1) if job.task.takes_videos else images  # all views of the videos
    return cost_table(reduction, inputs, whole, job.model)
