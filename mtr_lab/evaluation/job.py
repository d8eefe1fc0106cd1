"""From a composed configuration to an evaluation that can run: settings checked, weights loaded."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from mtr_lab import ops
from mtr_lab.compose import check_device, make_loggers, make_task, make_task_data, make_task_model, make_trainer
from mtr_lab.data.shard import ShardedEvaluation
from mtr_lab.errors import UserError, unknown
from mtr_lab.evaluation.budgets import calibration_count, check_budgets, divide
from mtr_lab.evaluation.points import operating_points, policy_settings, strongest
from mtr_lab.evaluation.progress import BatchWatch
from mtr_lab.launch import has_to_launch
from mtr_lab.packages import installed
from mtr_lab.reduction import AUTO, MEASURED, NO_TOKENS, Reduction, measured_on_images
from mtr_lab.results.environment import describe_environment
from mtr_lab.results.keys import Key, evaluation_key, unreduced_key
from mtr_lab.tasks.evaluation import OperatingPoint
from mtr_lab.tasks.task import AnyTask, DataModule


class Machine(NamedTuple):
    """What affects speed and the last digits of predictions, besides code and settings."""

    device: str
    details: list[str]

    @property
    def parts(self) -> list[str]:
        """All of it, as the keys of evaluations hash it."""
        return [self.device, *self.details]


@dataclass(frozen=True)
class Job:
    """An evaluation that can run."""

    config: DictConfig
    folder: Path
    """The run folder."""
    task: AnyTask
    model: nn.Module
    """The task's model with its weights, not yet patched."""
    points: list[OperatingPoint]
    """The unreduced model's comes first. With ``auto``, ``mtr.speedup`` or ``mtr.max_drop`` the schedules are
    provisional until they are measured."""
    calibration: Tensor | None
    """(N, 3, H, W), if schedules or ``mtr.max_drop`` are measured on images."""
    data: DataModule
    trainer: lightning.Trainer
    watch: BatchWatch
    launches: bool
    """Whether this process has to start the processes that evaluate, see ``mtr_lab.launch``."""
    batches: ShardedEvaluation
    """This process's share of the evaluation images."""
    loggers: dict[str, Logger]
    machine: Machine
    record: dict[str, Any]
    """The resolved configuration, without ``mtr.seed`` if the policy draws no random numbers."""
    key: Key
    """By which a finished evaluation is found and reused."""
    unreduced_key: str
    """The same for the unreduced model's predictions."""

    @property
    def wait(self) -> bool:
        """Whether to wait for another process in the same folder: the optimiser of a sweep needs ``objective``."""
        return self.config.objective is not None


def plan(config: DictConfig) -> Job:
    """Check a configuration on a model without weights, then load the weights.

    Raises:
        UserError: the configuration has a mistake. Weights are loaded last: other mistakes are reported before.
    """
    task = make_task(config.task)
    if config.backbone.num_frames is not None and not task.takes_videos:
        raise UserError(
            f"backbone.num_frames={config.backbone.num_frames}: task={task.name} takes images. Leave it out, or set "
            "task=video."
        )
    ops.set_backend(config.ops.backend)
    check_device(config.trainer)
    check_budgets(task, config)
    data, meta_model = make_task_data(task, config)
    reduction = Reduction(task.backbone(meta_model), provisional(policy_settings(config.mtr)))
    points = operating_points(reduction, config.mtr)
    if config.pictures:
        strongest(points)
    check_objective(task, config, points)
    calibration = calibration_images(data, config.mtr)
    loggers = dict(zip(config.logger, make_loggers(config.logger), strict=True))
    watch = BatchWatch()
    barless: Any = OmegaConf.merge(config.trainer, {"enable_progress_bar": False})  # Phases has the bar
    trainer = make_trainer(
        barless,
        distributed=True,
        logger=False,
        callbacks=[watch],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    launches = has_to_launch(trainer, config.trainer.get("trusted_network", False))

    lightning.seed_everything(config.seed, workers=True, verbose=False)
    model = make_task_model(task, config, data.num_classes)
    record: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    if not reduction.policy.draws:
        del record["mtr"]["seed"]
    weights, images, machine = task.backbone(model).weights["sha256"], data.fingerprint(), describe_machine(trainer)
    return Job(
        config=config,
        folder=Path(HydraConfig.get().runtime.output_dir),
        task=task,
        model=model,
        points=points,
        calibration=calibration,
        data=data,
        trainer=trainer,
        watch=watch,
        launches=launches,
        batches=ShardedEvaluation(data, trainer),
        loggers=loggers,
        machine=machine,
        record=record,
        key=evaluation_key(
            record, weights, [images, _digest(calibration)], machine.parts if config.timing.batch_size else []
        ),
        unreduced_key=unreduced_key(record, weights, images, machine.parts),
    )


def provisional(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a policy whose schedule can be solved without images: counts that are measured become ``constant``.

    A ratio within reach of ``auto`` is within reach of this constant schedule, in which all blocks reduce, or of the
    smaller picture alone.
    """
    if settings["paths"] == "least":
        settings = {**settings, "paths": "last"}  # which saves as much
    if not measured_on_images(settings):
        return settings
    if settings["resolution"] == AUTO:
        return {**settings, "schedule": NO_TOKENS}
    return {**settings, "schedule": "constant", "first_block": 0, "interval": 1}


def check_objective(task: AnyTask, config: DictConfig, points: list[OperatingPoint]) -> None:
    """Raise a ``UserError`` unless there is a reduced model, and the result will have the metric of ``objective``."""
    measured = ["img_per_s"] if config.trainer.cuda_graph else ["img_per_s", "peak_mib"]
    metrics = [*task.metrics, *(measured if config.timing.batch_size else [])]
    if config.objective is not None and config.objective not in metrics:
        raise unknown("objective", config.objective, metrics)
    if config.objective is not None and len(points) == 1:
        raise UserError(f"objective={config.objective} is that of the reduced model: give an mtr.ratio above 0.")


def calibration_images(data: DataModule, settings: DictConfig) -> Tensor | None:
    """Training images (N, 3, H, W) to measure schedules and ``mtr.max_drop`` on, ``None`` if neither is measured.

    They are never those of the evaluation.

    Args:
        settings: the ``mtr`` group.

    Raises:
        UserError: the dataset has no training images, they cannot be read, or are too few for ``mtr.max_drop``.
    """
    count = calibration_count(settings)
    if not count:
        return None
    try:
        images = data.calibration_images(count)
    except UserError as error:
        measured = measured_on_images(settings) or "mtr.max_drop"
        instead = {
            "mtr.max_drop": "give mtr.ratio",
            **{
                f"mtr.schedule={name}": "give the counts themselves: mtr.ratio=null mtr.schedule=[…]"
                for name in MEASURED
            },
            "mtr.resolution=auto": "give the size itself, such as mtr.resolution=0.75",
            "mtr.paths=least": "take mtr.paths=last",
        }
        raise UserError(
            f"{measured} measures on training images of the dataset, which cannot be read: {error} Or "
            f"{instead[measured]}."
        ) from error
    divide(settings, images)
    return images


def describe_machine(trainer: lightning.Trainer) -> Machine:
    """The machine that the trainer runs on."""
    environment, device = describe_environment(), trainer.strategy.root_device
    if device.type == "cuda":
        return Machine(torch.cuda.get_device_name(device), [f"mamba_ssm {installed('mamba_ssm')}"])
    return Machine(device.type, [str(environment["cpu"]), f"{environment['threads']} threads"])


def _digest(images: Tensor | None) -> str | None:
    return None if images is None else hashlib.blake2b(images.numpy().tobytes(), digest_size=16).hexdigest()
