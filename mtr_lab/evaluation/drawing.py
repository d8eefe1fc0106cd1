"""Pictures of images as the trainer computes with them: what a reduction does to each, and what the task finds."""

from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from mtr_lab.evaluation.placement import as_input, placed
from mtr_lab.pictures import Observation, observe
from mtr_lab.reduction import Reduction
from mtr_lab.tasks.evaluation import OperatingPoint
from mtr_lab.tasks.task import Evaluation, Task


def draw_images(
    task: Task,
    evaluation: Evaluation,
    reduced: OperatingPoint,
    datamodule: Any,
    trainer: lightning.Trainer,
    count: int,
    folder: Path,
) -> None:
    """The task's pictures of the first images in their order, unreduced and at one point.

    Args:
        task: says what a picture shows.
        evaluation: its first point is the unreduced model.
        reduced: the point to draw beside it.
        datamodule: whose evaluation images, as ``trainer`` has given them to the model before.
        count: of the images; they are numbered from 0 in the files' names.
        folder: to write to.

    Raises:
        UserError: nothing can be written there.
    """
    drawn = [evaluation.points[0], reduced]
    evaluation.reduction.use(reduced.schedule)
    observe = partial(observe_images, trainer, task.backbone(evaluation.model), evaluation.reduction)
    images = chain.from_iterable(map(task.single_images, datamodule.test_dataloader()))
    for i, image in enumerate(islice(images, count)):
        image["image"] = as_input(image, datamodule, trainer)
        stem = folder / f"{i:03}_{Path(image['id'][0]).stem}"
        with placed(evaluation.model, trainer), torch.no_grad():
            task.draw(evaluation, image, observe, drawn, datamodule.class_names, stem)


def observe_images(trainer: lightning.Trainer, model: Any, reduction: Reduction, images: Tensor) -> list[Observation]:
    """``observe`` of images (B, 3, H, W), or videos (B, 3, T, H, W), in the trainer's precision and on its device."""
    with placed(model, trainer) as moved:
        return observe(model, reduction, moved(images))
