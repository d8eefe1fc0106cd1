"""Speed and memory of a model at its operating points."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mtr_lab.evaluation.placement import as_input, placed
from mtr_lab.measure.speed import Speed, measure_speed
from mtr_lab.tasks.evaluation import Evaluation, OperatingPoint

if TYPE_CHECKING:
    from mtr_lab.evaluation.job import Job  # imports all tasks


def time_job(
    job: "Job",
    evaluation: Evaluation[Any],
    points: Sequence[OperatingPoint],
    advance: Callable[[float], None] = lambda share: None,
) -> dict[str, Speed]:
    """Time all points on evaluation images, in the trainer's precision and on its device.

    Args:
        advance: called with the share of the work that is done.
    """
    images = timing_images(job)
    with placed(evaluation.model, job.trainer):
        return time_points(evaluation, points, images, job.config.timing.seconds, advance)


def timing_images(job: "Job") -> Tensor:
    """Evaluation images (timing.batch_size, 3, H, W), or videos, repeated to fill the batch, as the model gets them."""
    size = job.config.timing.batch_size
    batch = next(batch for batch in job.data.test_dataloader() if len(batch["image"]))
    images = as_input(batch, job.data, job.trainer)
    return images.repeat(-(-size // len(images)), *[1] * (images.ndim - 1))[:size]


def time_points(
    evaluation: Evaluation[Any],
    points: Sequence[OperatingPoint],
    images: Tensor,
    seconds: float,
    advance: Callable[[float], None] = lambda share: None,
) -> dict[str, Speed]:
    """Time an evaluation's model at all points in turn, by name.

    Args:
        images: (B, 3, H, W), as the model expects them, on its device.
        seconds: for all points together.
    """
    return measure_speed(
        {point.name: partial(evaluation.forward_at, point) for point in points},
        images,
        resident={point.name: evaluation.model.parameters() for point in points},
        max_seconds=seconds,
        advance=advance,
    )
