"""Pictures of evaluation images: the effect of a reduction on the tokens, and the task's outputs."""

from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import Tensor

from mtr_lab.data.classes import readable_name
from mtr_lab.evaluation.placement import as_input, placed
from mtr_lab.pictures import Observation, observe
from mtr_lab.reduction import Reduction
from mtr_lab.results.schema import PICTURES
from mtr_lab.tasks.evaluation import Evaluation, OperatingPoint
from mtr_lab.tasks.task import Drawing

if TYPE_CHECKING:
    from mtr_lab.evaluation.job import Job  # imports all tasks


def draw_images(
    job: "Job",
    evaluation: Evaluation[Any],
    points: list[OperatingPoint],
    advance: Callable[[float], None] = lambda share: None,
) -> None:
    """Draw the first evaluation images at two points, to the pictures folder of the run folder.

    Args:
        job: its ``pictures`` is the number of images, which are numbered from 0 in the names of the files.
        evaluation: of the job's model.
        points: the unreduced model's, and the one to draw beside it.
        advance: called with the share of the pictures that are drawn.

    Raises:
        UserError: the files cannot be written.
    """
    evaluation.reduction.use(points[-1].schedule)
    watch = partial(observe_images, job.trainer, job.task.backbone(evaluation.model), evaluation.reduction)
    names = [readable_name(name) for name in job.data.class_names or ()]
    images = chain.from_iterable(map(job.task.single_images, job.data.test_dataloader()))
    for i, image in enumerate(islice(images, job.config.pictures)):
        advance(i / job.config.pictures)
        image["image"] = as_input(image, job.data, job.trainer)
        stem = job.folder / PICTURES / f"{i:03}_{Path(image['id'][0]).stem}"
        with placed(evaluation.model, job.trainer), torch.no_grad():
            job.task.draw(Drawing(evaluation, image, watch, points, names, stem))


def observe_images(trainer: lightning.Trainer, model: Any, reduction: Reduction, images: Tensor) -> list[Observation]:
    """``observe`` images (B, 3, H, W), or videos (B, 3, T, H, W), in the trainer's precision and on its device."""
    with placed(model, trainer) as prepare:
        return observe(model, reduction, prepare(images))
