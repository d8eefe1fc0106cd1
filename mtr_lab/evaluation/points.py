"""From the ``mtr`` group of the configuration to operating points, and what is known of one before it is run."""

from typing import Any

import lightning
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn

from mtr_lab.errors import UserError
from mtr_lab.evaluation.placement import placed
from mtr_lab.reduction import Reduction
from mtr_lab.tasks.evaluation import OperatingPoint
from mtr_lab.tasks.task import Task


def policy_settings(settings: DictConfig) -> dict[str, Any]:
    """The ``mtr`` group without the ratios: what ``Reduction`` takes."""
    return {str(key): value for key, value in OmegaConf.to_container(settings).items() if key != "ratio"}  # type: ignore[union-attr]


def operating_points(reduction: Reduction, settings: DictConfig) -> list[OperatingPoint]:
    """The unreduced model and the policy at every ratio of the ``mtr`` group (or at the counts it gives).

    Raises:
        UserError: the schedule cannot be had.
    """
    ratio = settings.ratio
    asked = list(ratio) if isinstance(ratio, ListConfig) else [ratio]
    for value in asked:
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise UserError(f"mtr.ratio must be a share of the FLOPs in [0, 1), or a list of them, got {value!r}.")
    asked = [value for value in dict.fromkeys(asked) if value != 0]
    return [
        OperatingPoint("none", 0.0, reduction.solve(0.0)),
        *(OperatingPoint(settings.policy, value, reduction.solve(value)) for value in asked),
    ]


def measured_points(
    model: Any, settings: dict[str, Any], images: Tensor, trainer: lightning.Trainer, mtr: DictConfig
) -> list[OperatingPoint]:
    """``operating_points`` of ``mtr.schedule=auto``, measured in the trainer's precision and on its device.

    Args:
        model: the backbone with its weights.
        settings: of the policy, see :func:`policy_settings`.
        images: (B, 3, H, W) to measure on, normalised.
        trainer: says precision and device.
        mtr: the group of the configuration.

    Raises:
        UserError: the schedule cannot be had.
    """
    with placed(model, trainer) as moved:
        return operating_points(Reduction(model, settings, images=moved(images)), mtr)


def strongest(points: list[OperatingPoint]) -> OperatingPoint:
    """The point that removes most.

    Raises:
        UserError: none removes anything.
    """
    point = max(points, key=lambda point: point.schedule.reduction)
    if not point.schedule.acts:
        raise UserError("there is nothing to draw where no token is removed: give an mtr.ratio above 0.")
    return point


def describe(task: Task, model: nn.Module, point: OperatingPoint) -> dict[str, Any]:
    """What is known of a point before a single image has been seen."""
    schedule, head = point.schedule, task.head_flops(model)
    return {
        "policy": point.policy,
        "ratio": point.ratio,
        "reduction": schedule.reduction,
        "flops_literature": schedule.flops_literature,
        "flops_true": schedule.flops + schedule.flops_overhead,
        "flops_overhead": schedule.flops_overhead,
        **({} if head is None else {"flops_head": head}),
        "tokens": list(schedule.tokens),
    }
