"""Training a reduced model: the schedule of every epoch."""

from collections.abc import Callable, Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig, ListConfig

from mtr_lab.errors import UserError
from mtr_lab.reduction import MEASURED, Reduction, Schedule


class ReducedTraining(Callback):
    """Patches the backbone, and puts the schedule of every epoch in force.

    Args:
        settings: of the policy, see ``mtr_lab.evaluation.points.policy_settings``.
        schedules: of epochs 0, 1, …; the last one also of all later epochs, and of validation.
        backbone: of the module's model, what is patched.
    """

    def __init__(self, settings: dict[str, Any], schedules: Sequence[Schedule], backbone: Callable[[Any], Any]) -> None:
        self._settings, self._schedules, self._backbone = settings, schedules, backbone

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reduction = Reduction(self._backbone(pl_module.model), self._settings)
        self._use_for_epoch(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._use_for_epoch(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reduction.use(self._schedules[-1])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._use_for_epoch(trainer)

    def _use_for_epoch(self, trainer: Trainer) -> None:
        self._reduction.use(self._schedules[min(trainer.current_epoch, len(self._schedules) - 1)])


def unfused_settings(mtr: DictConfig) -> list[str]:
    """The settings of a policy whose gradients no fused GPU kernel computes, as ``key=value``.

    With one of them the blocks from the first reduced one on run as separate operations in training.
    """
    return [f"mtr.{key}={mtr[key]}" for key in ("align", "stretch") if mtr[key]]


def epoch_ratios(mtr: DictConfig, warmup_epochs: int) -> list[float | None]:
    """The ratio of epochs 0, 1, …, rising linearly by whole epochs; the last one holds from then on.

    ``None`` stands for the counts that ``mtr.schedule`` gives; the list is empty if nothing is reduced.

    Raises:
        UserError: the ratios cannot be trained with.
    """
    ratio = mtr.ratio
    if isinstance(ratio, ListConfig):
        raise UserError(f"mtr.ratio={ratio}: training takes one ratio. Train several runs with -m mtr.ratio=0.2,0.4.")
    if ratio == 0:
        return []
    if isinstance(mtr.schedule, str) and mtr.schedule in MEASURED:
        raise UserError(
            f"mtr.schedule={mtr.schedule} is measured on trained weights: for training choose constant, linear, front "
            "or counts."
        )
    if ratio is None:
        if warmup_epochs:
            raise UserError(
                f"training.ratio_warmup_epochs={warmup_epochs} needs an mtr.ratio to rise to: the counts of "
                "mtr.schedule are fixed. Set it to 0."
            )
        return [None]
    return [ratio * (epoch + 1) / (warmup_epochs + 1) for epoch in range(warmup_epochs)] + [ratio]
