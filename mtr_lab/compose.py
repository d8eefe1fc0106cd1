"""Build the model, the data, the task and the Lightning trainer that a configuration describes."""

import logging
import os
import warnings
from copy import copy
from functools import partial
from typing import Any

import lightning
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    LSFEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf, open_dict
from timm.data import resolve_model_data_config
from torch import nn

from mtr_lab.backbones import create_model
from mtr_lab.errors import UserError, unknown
from mtr_lab.tasks.classification.task import Classification
from mtr_lab.tasks.detection.task import Detection
from mtr_lab.tasks.segmentation.task import Segmentation
from mtr_lab.tasks.task import AnyTask, DataModule
from mtr_lab.tasks.video.task import VideoClassification

TASKS: dict[str, type[AnyTask]] = {
    task.name: task for task in (Classification, Detection, Segmentation, VideoClassification)
}


def make_model(config: DictConfig, **changes: Any) -> Any:
    """Create the model of the ``backbone`` group; where a key is null the model's default applies."""
    settings: dict[Any, Any] = {**OmegaConf.to_container(config, resolve=True), **changes}  # type: ignore[dict-item]
    arguments = {key: value for key, value in settings.items() if key != "name" and value is not None}
    return create_model(settings["name"], **arguments)


def make_meta_model(config: DictConfig) -> Any:
    """Create the model on the meta device, without memory or weights: the other settings are checked against it."""
    with torch.device("meta"):
        return make_model(config)


def make_task(config: DictConfig) -> AnyTask:
    """The task of the ``task`` group.

    Raises:
        UserError: the task is unknown.
    """
    if config.name not in TASKS:
        raise unknown("task.name", config.name, TASKS)
    settings: dict[Any, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    return TASKS[config.name]({key: settings[key] for key in settings if key not in ("name", "timing_batch_size")})


def make_task_data(task: AnyTask, config: DictConfig) -> tuple[DataModule, nn.Module]:
    """The data of the ``dataset`` group for evaluating the task's model, and that model on the meta device.

    Without memory or weights, the model is there to check the rest of the configuration against.

    Raises:
        UserError: the data cannot be read, the classes do not fit, or a setting of the head is impossible.
    """
    task.check(config.trainer)
    backbone = make_meta_model(config.backbone)
    arguments = task.data_arguments(backbone, task.checkpoint(config.backbone))
    datamodule = make_datamodule(task, config.dataset, backbone, **arguments)
    with torch.device("meta"):
        return datamodule, task.assemble(backbone, datamodule.num_classes)


def make_task_model(task: AnyTask, config: DictConfig, num_classes: Any) -> nn.Module:
    """The model that the task evaluates, with its weights.

    Args:
        num_classes: of the data; may be ``None`` for a classifier, whose backbone has its classes.
    """
    return task.evaluated_model(partial(make_model, config.backbone), task.checkpoint(config.backbone), num_classes)


def make_datamodule(task: AnyTask, config: DictConfig, model: Any, **arguments: Any) -> Any:
    """The data of the ``dataset`` group, preprocessed as the model's weights expect.

    Raises:
        UserError: the data cannot be read, or are those of another task.
    """
    kind = get_class(str(config.get("_target_")))
    if not issubclass(kind, task.datamodule):
        fitting = [other.name for other in TASKS.values() if issubclass(kind, other.datamodule)]
        raise UserError(
            f"dataset={config.name} is for task={' or '.join(fitting)}, not for task={task.name}. Choose another task, "
            "or another dataset; without dataset= a task takes its bundled one."
            if fitting
            else f"dataset={config.name} fits no task: {kind.__name__} is not a data module of mtr_lab."
        )
    return _instantiate("dataset", config, data_config=resolve_model_data_config(model), **arguments)


def make_trainer(
    config: DictConfig, distributed: bool = False, ddp: str = "ddp", **arguments: Any
) -> lightning.Trainer:
    """Create the trainer of the ``trainer`` group.

    Args:
        distributed: allow several processes (``trainer=ddp``), which divide the data among themselves.
        ddp: the strategy that ``trainer=ddp`` stands for, by Lightning's name.

    Raises:
        UserError: the device is absent, Lightning refuses the configuration, or it needs several processes and
            ``distributed`` is false.
    """
    check_device(config)
    config = copy(config)
    with open_dict(config):
        for key in ("cuda_graph", "trusted_network"):  # Lightning has no such arguments
            config.pop(key, None)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # Lightning prints devices and advertisements
    warnings.filterwarnings("ignore", message="The number of training batches .* is smaller than the logging interval")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # raised inside Lightning by new versions of PyTorch
    shares = distributed and config.get("strategy") == "ddp"
    if shares:
        config.strategy = ddp
        arguments["use_distributed_sampler"] = False
    one_task = shares and os.environ.get("SLURM_NTASKS") == "1"  # this program starts the processes
    external = LSFEnvironment.detect() or (SLURMEnvironment.detect() and not one_task)
    if not external and not TorchElasticEnvironment.detect():
        # Lightning would look for MPI, which listens on all interfaces from its import on.
        arguments["plugins"] = [*arguments.get("plugins", []), LightningEnvironment()]
    trainer: lightning.Trainer = _instantiate("trainer", config, **arguments)
    if trainer.world_size != 1 and not shares:
        instead = "Choose trainer=ddp to use several devices" if distributed else "Set trainer.devices=1"
        raise UserError(
            f"trainer.devices={config.devices} starts {trainer.world_size} processes, which only evaluation and "
            f"training with trainer=ddp may do. {instead}."
        )
    if trainer.world_size == 1 and shares:  # no process group is needed
        config.strategy = "auto"
        trainer = _instantiate("trainer", config, **arguments)
    for limit in ("limit_train_batches", "limit_test_batches"):
        if getattr(trainer, limit) == 0:
            raise UserError(f"trainer.{limit}=0 leaves nothing to do: give a number of batches, or a share above 0.")
    return trainer


def make_loggers(config: DictConfig) -> list[Logger]:
    """Create the loggers of the ``logger`` group."""
    return [_instantiate(f"logger.{name!s}", logger) for name, logger in config.items()]


def _instantiate(name: str, config: DictConfig, **arguments: Any) -> Any:
    for key in arguments:
        if key in config:
            raise UserError(f"{name}.{key} cannot be set: the program sets it itself.")
    try:
        return instantiate(config, **arguments)
    except InstantiationException as error:  # Hydra wraps the constructor's error
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        raise UserError(f"{name}: {error.__cause__ or error}") from error


def check_device(config: DictConfig) -> None:
    """Raise a ``UserError`` if the ``trainer`` group asks for a device this machine does not have."""
    graph = config.get("cuda_graph", False)
    if graph and (config.accelerator == "cpu" or not torch.cuda.is_available()):
        present = "is present" if not torch.cuda.is_available() else "is to be used (trainer.accelerator=cpu)"
        raise UserError(f"trainer.cuda_graph=true: no CUDA device {present}. Set trainer.cuda_graph=false.")
    wants_gpu = config.accelerator in ("gpu", "cuda")
    if wants_gpu and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator={config.accelerator}: no CUDA device is present. "
            "Use trainer.accelerator=cpu, or auto for any device that is present."
        )
    if wants_gpu and isinstance(config.devices, int) and config.devices > torch.cuda.device_count():
        raise UserError(f"trainer.devices={config.devices}: {torch.cuda.device_count()} CUDA devices are present.")
