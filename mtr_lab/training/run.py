"""Train a task's model; the run folder receives its weights, log and recipe."""

import hashlib
import json
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning import Callback, seed_everything
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from safetensors.torch import save
from torch import nn

from mtr_lab import ops
from mtr_lab.backbones import Backbone
from mtr_lab.cli.program import is_rank_zero
from mtr_lab.cli.signals import last_words
from mtr_lab.compose import (
    check_device,
    make_datamodule,
    make_loggers,
    make_meta_model,
    make_model,
    make_task,
    make_trainer,
)
from mtr_lab.errors import UserError
from mtr_lab.evaluation.points import policy_settings
from mtr_lab.launch import has_to_launch, is_launched, launch
from mtr_lab.reduction import Reduction, Schedule
from mtr_lab.results.atomic import replace_file
from mtr_lab.results.environment import describe_environment
from mtr_lab.results.store import claim
from mtr_lab.tasks.ranks import of_all_ranks
from mtr_lab.tasks.task import Task
from mtr_lab.training.averaging import WeightEMA
from mtr_lab.training.checkpoint import LastCheckpoint, PlainCheckpointIO, check_resume
from mtr_lab.training.curve import draw_curve
from mtr_lab.training.graphed_ddp import GRAPHED_DDP
from mtr_lab.training.history import History, TrainingBar, last_values, table
from mtr_lab.training.randomness import SeedEpochs
from mtr_lab.training.reduced import ReducedTraining, epoch_ratios, unfused_settings

LAST = "last.ckpt"


def train(config: DictConfig) -> Path:
    """Train what ``conf/train.yaml`` describes.

    Returns:
        The run folder. It holds ``model.safetensors`` (weights averaged over the last steps, half precision, class
        names in its metadata), ``last.ckpt`` to resume from, ``metrics.csv`` and ``curve.svg`` (a row and a point an
        epoch), and ``training.json`` (recipe, final figures, SHA-256).

    Raises:
        UserError: anything in the configuration that training is not possible with, before it starts; another process
            that writes to the run folder.
    """
    folder, start = Path(HydraConfig.get().runtime.output_dir), time.time()
    alone = is_rank_zero() and not is_launched()  # the launcher of others holds the lock
    with last_words(lambda: kept(folder, start)), claim(folder) if alone else nullcontext():
        return _train(config, folder)


def kept(folder: Path, start: float) -> str:
    """What the end of a training that began at ``start``, seconds since the epoch, leaves."""
    checkpoint = folder / LAST
    if checkpoint.exists() and checkpoint.stat().st_mtime >= start:
        return (
            f"{checkpoint} has the finished epochs; continue with training.resume={checkpoint} and the same settings."
        )
    return "No epoch was finished; the same command starts again."


def _train(config: DictConfig, folder: Path) -> Path:
    ops.set_backend(config.ops.backend)
    check_device(config.trainer)
    settings = config.training
    task, meta_model = make_task(config.task), make_meta_model(config.backbone)
    datamodule = make_datamodule(
        task, config.dataset, meta_model, seed=config.seed, **task.training_arguments(meta_model)
    )
    create = partial(make_model, config.backbone)
    with torch.device("meta"):
        meta_task_model: Any = task.trained_model(create, datamodule.num_classes)
    schedules = make_schedules(task.backbone(meta_task_model), config)
    resumed = None
    if settings.resume is not None:
        resumed = check_resume(str(settings.resume), task.training(meta_task_model, config), resume_settings(config))
    history = History(folder, config.dataset.batch_size)
    trainer = make_trainer(
        config.trainer,
        distributed=True,
        ddp=GRAPHED_DDP if config.trainer.cuda_graph else "ddp",
        max_epochs=settings.epochs,
        logger=[logger for logger in make_loggers(config.logger) if not isinstance(logger, CSVLogger)],  # see History
        callbacks=[
            SeedEpochs(config.seed),
            *make_reduction(task, config, schedules),
            WeightEMA(settings.ema_decay),
            history,
            *([TrainingBar(history)] if config.trainer.enable_progress_bar else []),
            LastCheckpoint(folder / LAST, resume_settings(config)),
        ],
        plugins=[PlainCheckpointIO()],
        num_sanity_val_steps=0,
        enable_model_summary=False,
        sync_batchnorm=syncs_batchnorm(config.trainer),
    )
    # Before every step Lightning broadcasts whether rank 0 got SIGTERM, and waits for the device to read the answer. A
    # signal reaches every process here, and one that ends alone is noticed by the launcher.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    task.check_training(config, trainer.world_size)
    if has_to_launch(trainer, config.trainer.get("trusted_network", False)):
        return Path(launch(train, config, trainer.num_devices))

    seed_everything(config.seed, workers=True, verbose=False)
    module: Any = task.training(task.trained_model(create, datamodule.num_classes), config)
    if settings.freeze_backbone:
        freeze_backbone(task, module.model)
    if trainer.is_global_zero and resumed is not None:
        left = f"resuming after {resumed} of {settings.epochs} epochs"
        print(left if resumed < settings.epochs else f"{settings.resume} has all epochs: only its files are written")
    if trainer.is_global_zero and not config.dataset.holdout:
        print(
            "nothing is validated while training: dataset.holdout=0 holds out no training images, and those of "
            f"{config.dataset.test_split} are for mtr-lab eval"
        )
    unfused = unfused_settings(config.mtr) if schedules else []
    if trainer.is_global_zero and unfused and trainer.strategy.root_device.type == "cuda":
        print(
            f"{' and '.join(unfused)}: no fused GPU kernel has this gradient, so reduced blocks train by separate "
            "operations, slower and with more memory"
        )
    start = time.perf_counter()
    for noise in (
        "Total length of `list` across ranks is zero",  # nothing is held out
        "Grad strides do not match bucket view strides",  # of sides of 1, where strides do not matter
        "The AccumulateGrad node's stream does not match",  # with several processes, and in the capture of a graph
        "Attempting to run cuBLAS, but there was no current CUDA context",  # the thread of a backward pass gets one
    ):
        warnings.filterwarnings("ignore", message=noise)
    trainer.fit(module, datamodule=datamodule, ckpt_path=settings.resume and str(settings.resume))
    skipped = sorted(set[str]().union(*of_all_ranks(module.skipped)))
    if not trainer.is_global_zero:
        return folder

    weights = folder / "model.safetensors"
    save_weights(module.model, task.backbone(module.model), weights, datamodule.class_names)
    draw_curve(history.rows, folder / "curve.svg")
    record = {
        "config": OmegaConf.to_container(config, resolve=True),
        "environment": describe_environment(),
        "devices": trainer.world_size,
        "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
        "reduction": describe_schedule(config, schedules),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "final": {name: value for name, value in last_values(history.rows).items() if name not in ("epoch", "step")},
        "skipped": skipped,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    with replace_file(folder / "training.json") as stream:
        stream.write(f"{json.dumps(record, indent=1)}\n".encode())
    minutes = (time.perf_counter() - start) / 60
    epochs = f"{trainer.current_epoch} epoch{'s' * (trainer.current_epoch != 1)}"
    Console().print(table(history.rows, f"{epochs}, {trainer.global_step} steps, {minutes:.1f} min"))
    print(f"wrote {weights} and, beside it, training.json, metrics.csv, curve.svg and last.ckpt")
    return folder


def make_schedules(backbone: Backbone, config: DictConfig) -> list[Schedule]:
    """The schedules of epochs 0, 1, …, of which the last one holds from then on; none if nothing is reduced.

    Raises:
        UserError: a ratio is out of reach, or a policy was chosen and no ratio.
    """
    ratios = epoch_ratios(config.mtr, config.training.ratio_warmup_epochs)
    if not ratios:
        given = {override.partition("=")[0] for override in HydraConfig.get().overrides.task}
        if "reduction" in given and "mtr.ratio" not in given:
            raise UserError(
                f"reduction={config.mtr.policy}: give the share of the FLOPs to remove while training, mtr.ratio=0.4, "
                "or mtr.ratio=0 for an unreduced model."
            )
        return []
    reduction = Reduction(backbone, policy_settings(config.mtr))
    return [reduction.solve(ratio) for ratio in ratios]


def make_reduction(task: Task, config: DictConfig, schedules: Sequence[Schedule]) -> list[Callback]:
    """What patches the model, if it is reduced."""
    return [ReducedTraining(policy_settings(config.mtr), schedules, task.backbone)] if schedules else []


def describe_schedule(config: DictConfig, schedules: Sequence[Schedule]) -> dict[str, Any] | None:
    """What the model that was validated removes, and the epochs that removed less."""
    if not schedules:
        return None
    return {
        "policy": config.mtr.policy,
        "ratio": config.mtr.ratio,
        "reduction": schedules[-1].reduction,
        "tokens": list(schedules[-1].tokens),
        "warmup": [schedule.reduction for schedule in schedules[:-1]],
    }


def resume_settings(config: DictConfig) -> dict[str, Any]:
    """What decides the course of a run, by key, besides the model and the data; devices and paths do not."""
    training: Any = OmegaConf.to_container(config.training, resolve=True)
    mtr: Any = OmegaConf.to_container(config.mtr, resolve=True)
    idle = {"resume"} if training["teacher"] is not None else {"resume", "distillation", "temperature"}
    groups = {
        "training": {key: training[key] for key in training if key not in idle},
        "mtr": mtr if mtr["ratio"] != 0 else {},
    }
    flat = {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}
    dataset = ("batch_size", "holdout", "train_transform", "train_cache")
    trainer = ("precision", "gradient_clip_val", "accumulate_grad_batches")
    for key in (
        *(f"dataset.{name}" for name in dataset),
        *(f"trainer.{name}" for name in trainer),
        "backbone.drop_path_rate",
        "seed",
    ):
        value = OmegaConf.select(config, key)
        flat[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return flat


def syncs_batchnorm(trainer: DictConfig) -> bool:
    """Whether batch normalisation, of the segmentation head, is over the images of all devices.

    PyTorch has that for GPUs alone. A CUDA graph would contain messages between them.
    """
    return trainer.accelerator != "cpu" and torch.cuda.is_available() and not trainer.cuda_graph


def freeze_backbone(task: Task, model: nn.Module) -> None:
    """Train the head of a dense task alone."""
    backbone = task.backbone(model)
    if backbone is model:
        raise UserError(
            "training.freeze_backbone=true trains the head of a dense task, and a classifier's head is part of its "
            "backbone. Set it to false."
        )
    backbone.requires_grad_(False)


def save_weights(model: nn.Module, backbone: Backbone, path: Path, label_names: Sequence[str] | None) -> None:
    """Store a model's parameters in half precision, with the names of its classes and its patch grid if not square."""
    state = {
        name: value.detach().to("cpu", torch.float16 if value.is_floating_point() else value.dtype).contiguous()
        for name, value in model.state_dict().items()
    }
    metadata = {"label_names": json.dumps(label_names)} if label_names else {}
    rows, columns = backbone.layouts()[0].grid
    if rows != columns:  # what a reader assumes; and the order of two entries would change the file's hash
        metadata["grid_size"] = json.dumps([rows, columns])
    with replace_file(path) as stream:
        stream.write(save(state, metadata or None))
