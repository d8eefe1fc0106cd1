"""Evaluate a backbone unreduced and reduced: accuracy, FLOPs, speed; one result in the run folder."""

import contextlib
import hashlib
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from mtr_lab import ops
from mtr_lab.compose import (
    check_device,
    make_loggers,
    make_meta_model,
    make_meta_task_model,
    make_task,
    make_task_data,
    make_task_model,
    make_trainer,
)
from mtr_lab.data.shard import ShardedEvaluation
from mtr_lab.errors import UserError, unknown
from mtr_lab.evaluation.drawing import draw_images
from mtr_lab.evaluation.passes import lead, make_evaluations, predict, serve_passes
from mtr_lab.evaluation.placement import as_input, placed
from mtr_lab.evaluation.points import describe, measured_points, operating_points, policy_settings, strongest
from mtr_lab.launch import has_to_launch, launch
from mtr_lab.measure.speed import Speed, measure_speed
from mtr_lab.ops import installed
from mtr_lab.reduction import AUTO, Reduction
from mtr_lab.report.loggers import log_result
from mtr_lab.report.table import result_table
from mtr_lab.results.environment import describe_environment
from mtr_lab.results.keys import Key, evaluation_key, unreduced_key
from mtr_lab.results.predictions import FILE_NAME as PREDICTIONS
from mtr_lab.results.schema import FILE_NAME as RESULT
from mtr_lab.results.schema import PICTURES, Result, read_result, write_result
from mtr_lab.results.store import UnreducedCache, claim, find_finished, write_run
from mtr_lab.sweep import JobResult, sweep_folder
from mtr_lab.tasks.evaluation import OperatingPoint
from mtr_lab.tasks.task import Evaluation, Task

CALIBRATION_IMAGES = 128
"""How many training images ``mtr.schedule=auto`` measures on."""


def evaluate(config: DictConfig) -> JobResult | None:
    """Carry out what ``conf/config.yaml`` describes; write the result, print it as a table and log it.

    Everything the user can have got wrong is found on an outline of the model, before weights are loaded. The counts of
    ``mtr.schedule=auto`` are measured after that, on training images. What was finished before, by the same code on the
    same weights and data, is not computed again.

    Returns:
        The result, as in the file ``result.json`` of the run folder, and whether it was computed now. With
        ``trainer=ddp`` nothing but in the process that leads, which alone writes, times and draws; see
        ``mtr_lab.launch``.

    Raises:
        UserError: anything in the configuration that cannot be carried out; another process uses the run folder.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    if config.backbone.num_frames is not None:
        raise UserError(
            f"backbone.num_frames={config.backbone.num_frames}: evaluation takes images. Leave it out, or draw a video "
            "with python -m mtr_lab.visualize CLIP."
        )
    ops.set_backend(config.ops.backend)
    check_device(config.trainer)
    task, outline = make_task(config.task), make_meta_model(config.backbone)
    datamodule = make_task_data(task, config, outline)
    outline = task.backbone(make_meta_task_model(task, config, datamodule.num_classes))
    settings = policy_settings(config.mtr)
    automatic = settings["schedule"] == AUTO
    outlined = {**settings, "schedule": "constant", "first_block": 0, "interval": 1} if automatic else settings
    outline_reduction = Reduction(outline, outlined)
    points = operating_points(outline_reduction, config.mtr)
    if config.pictures:
        strongest(points)
    check_objective(task, config, points)
    probes = calibration_images(datamodule) if automatic else None
    loggers = make_loggers(config.logger)
    trainer = make_trainer(
        config.trainer, distributed=True, logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    launches = has_to_launch(trainer)

    lightning.seed_everything(config.seed, workers=True, verbose=False)
    model = make_task_model(task, config, datamodule.num_classes)
    backbone = task.backbone(model)
    resolved: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    if not outline_reduction.policy.draws:
        del resolved["mtr"]["seed"]  # no part of the key, nor of the result
    weights, data, machine = backbone.weights["sha256"], datamodule.fingerprint(), _machine(trainer)
    measured_on = None if probes is None else hashlib.blake2b(probes.numpy().tobytes(), digest_size=16).hexdigest()
    key = evaluation_key(resolved, weights, [data, measured_on], machine if config.timing.batch_size else [])
    sweep, named = sweep_folder(), dict(zip(config.logger, loggers, strict=True))
    if launches:
        with claim(folder, wait=config.objective is not None):
            finished = take_finished(config, folder, key, named)
            if finished is None:
                start_over(folder)
        return finished or launch(evaluate, config, trainer.num_devices)
    batches = ShardedEvaluation(datamodule, trainer)
    if trainer.world_size > 1:
        trainer.strategy.setup_environment()
        if not trainer.is_global_zero:
            serve_passes(make_evaluations(task, model, settings, config), trainer, batches)
            return None
    with claim(folder, wait=config.objective is not None), lead():
        finished = take_finished(config, folder, key, named)
        if finished is not None:
            return finished

        start_over(folder)
        if probes is not None:
            points = measured_points(backbone, settings, probes, trainer, config.mtr)
        share = unreduced_key(resolved, weights, data, machine)
        make_evaluation = make_evaluations(task, model, settings, config)
        unreduced = UnreducedCache(sweep / "unreduced" / share) if sweep else None
        found = predict(points, make_evaluation, trainer, batches, unreduced)
        evaluation = make_evaluation(points)
        speeds = time_points(evaluation, datamodule, trainer, config.timing) if config.timing.batch_size else {}
        result: Result = {
            "schema": 1,
            "task": config.task.name,
            "backbone": config.backbone.name,
            "dataset": datamodule.name,
            "weights": backbone.weights,
            "key": key,
            "unreduced": {"key": share, "reused": found.reused},
            "logged": [],
            "config": resolved,
            "environment": {**describe_environment(), "device": machine[0]},
            "points": [
                {
                    **describe(task, model, point),  # type: ignore[typeddict-item]
                    "skipped": found.skipped,
                    **task.score(found.predictions, i),
                    **describe_speed(speeds.get(point.name), with_memory=not config.trainer.cuda_graph),
                }
                for i, point in enumerate(points)
            ],
        }
        if config.pictures:
            draw_images(task, evaluation, strongest(points), datamodule, trainer, config.pictures, folder / PICTURES)
        for file in write_run(result, found.predictions, folder):
            print(f"wrote {file}")
        hand_over(folder, named)
    return JobResult(result, True, objective_value(result, config.objective))


def take_finished(config: DictConfig, folder: Path, key: Key, loggers: Mapping[str, Logger]) -> JobResult | None:
    """What was finished before under this key, in the claimed ``folder`` or elsewhere in the sweep; handed over."""
    finished = find_finished(folder, key, sweep_folder()) if config.resume else None
    if finished is None:
        return None
    print(f"{finished}: finished before; resume=false computes it again.")
    with contextlib.nullcontext() if finished == folder else claim(finished, wait=True):
        result = hand_over(finished, loggers)
    return JobResult(result, False, objective_value(result, config.objective))


def hand_over(folder: Path, loggers: Mapping[str, Logger]) -> Result:
    """Print a finished point and hand it to the loggers that have not had it yet, taking note of each that has."""
    result = read_result(folder)
    Console().print(result_table(result))
    for name, logger in loggers.items():
        if name not in result.get("logged", []):
            log_result(result, [folder / RESULT, folder / PREDICTIONS], logger, pictures=folder / PICTURES)
            result["logged"] = [*result.get("logged", []), name]
            write_result(result, folder)
    return result


def start_over(folder: Path) -> None:
    """Remove what an earlier evaluation of other things has left in a run folder."""
    (folder / RESULT).unlink(missing_ok=True)
    shutil.rmtree(folder / PICTURES, ignore_errors=True)


def check_objective(task: Task, config: DictConfig, points: list[OperatingPoint]) -> None:
    """Raise a ``UserError`` unless the result will have the metric that ``objective`` names."""
    measured = ["img_per_s"] if config.trainer.cuda_graph else ["img_per_s", "peak_mib"]
    metrics = [*task.metrics, *(measured if config.timing.batch_size else [])]
    if config.objective is not None and config.objective not in metrics:
        raise unknown("objective", config.objective, metrics)
    if config.objective is not None and len(points) == 1:
        raise UserError(f"objective={config.objective} is that of the reduced model: give an mtr.ratio above 0.")


def objective_value(result: Result, metric: str | None) -> float | None:
    """The mean of a metric over the reduced points, if one is asked for."""
    if metric is None:
        return None
    values = [point[metric] for point in result["points"] if point["policy"] != "none"]  # type: ignore[literal-required]
    if None in values:
        raise UserError(f"objective={metric}: the result has no such figure, since no image could be read.")
    return fmean(values)


def _machine(trainer: lightning.Trainer) -> list[str]:
    """What a speed, and the last digit of a prediction, depend on besides configuration and code; the device first."""
    here, device = describe_environment(), trainer.strategy.root_device
    if device.type == "cuda":
        kernels = installed("mamba_ssm")
        return [torch.cuda.get_device_name(device), f"mamba_ssm {kernels}"]
    return [device.type, str(here["cpu"]), f"{here['threads']} threads"]


def calibration_images(datamodule: Any) -> Tensor:
    """The images ``mtr.schedule=auto`` measures on, (128, 3, H, W): training images, never those it is evaluated on."""
    try:
        return datamodule.calibration_images(CALIBRATION_IMAGES)
    except UserError as error:
        raise UserError(
            f"mtr.schedule=auto measures on training images of the dataset, and cannot have them: {error} "
            "Or give the counts themselves: mtr.ratio=null mtr.schedule=[…]."
        ) from error


def time_points(
    evaluation: Evaluation, datamodule: Any, trainer: lightning.Trainer, settings: DictConfig
) -> dict[str, Speed]:
    """Time all points in turn on real images, repeated to fill the batch, in the trainer's precision and device."""
    batch = next(batch for batch in datamodule.test_dataloader() if len(batch["image"]))
    images = as_input(batch, datamodule, trainer)
    images = images.repeat(-(-settings.batch_size // len(images)), 1, 1, 1)[: settings.batch_size]
    with placed(evaluation.model, trainer):
        return measure_speed(
            {point.name: partial(evaluation.forward_at, point) for point in evaluation.points},
            images,
            resident={point.name: evaluation.model.parameters() for point in evaluation.points},
            max_seconds=settings.seconds,
        )


def describe_speed(speed: Speed | None, with_memory: bool) -> dict[str, Any]:
    """The measured part of a point; nothing if no timing was asked for.

    Without the memory for CUDA graphs, which allocate it when they are captured and not during the measured call.
    """
    if speed is None:
        return {}
    memory = {"peak_mib": speed.peak_mib} if with_memory else {}
    return {"img_per_s": speed.img_per_s, "latency_ms": speed.latency_ms, **memory}
