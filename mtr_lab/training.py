"""Train a task's model; the run folder receives its weights, log and recipe."""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save
from torch import nn

from mtr_lab import ops
from mtr_lab.backbones import Backbone
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
from mtr_lab.results.atomic import replace_file
from mtr_lab.results.environment import describe_environment


def train(config: DictConfig) -> Path:
    """Train what ``conf/train.yaml`` describes.

    Returns:
        The run folder. It holds ``model.safetensors`` (weights averaged over the last steps, half precision, class
        names in its metadata), ``last.ckpt`` to resume from, and ``training.json`` (recipe, final figures, SHA-256).

    Raises:
        UserError: the configuration has a mistake; raised before training starts.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    ops.set_backend(config.ops.backend)
    check_device(config.trainer)
    settings = config.training
    seed_everything(config.seed, workers=True, verbose=False)
    task, meta_model = make_task(config.task), make_meta_model(config.backbone)
    task.check_training(config)
    arguments = task.training_arguments()
    datamodule = make_datamodule(task, config.dataset, meta_model, seed=config.seed, **arguments)
    create = partial(make_model, config.backbone)
    with torch.device("meta"):
        task.trained_model(create, datamodule.num_classes)
    module: Any = task.training(task.trained_model(create, datamodule.num_classes), config)
    if settings.freeze_backbone:
        backbone = task.backbone(module.model)
        if backbone is module.model:
            raise UserError(
                "training.freeze_backbone=true leaves nothing to train: a classifier is all backbone. Set it to false."
            )
        backbone.requires_grad_(False)
    if settings.resume is not None:
        check_resume(str(settings.resume), module)
    trainer = make_trainer(
        config.trainer,
        max_epochs=settings.epochs,
        logger=make_loggers(config.logger),
        callbacks=[ModelCheckpoint(dirpath=folder, filename="last", enable_version_counter=False)],
    )
    # By default the average would stay on the CPU, where the model is at its setup.
    trainer.callbacks.insert(0, WeightEMA(settings.ema_decay, trainer.strategy.root_device))  # type: ignore[attr-defined]
    trainer.fit(module, datamodule=datamodule, ckpt_path=settings.resume and str(settings.resume), weights_only=False)

    weights = folder / "model.safetensors"
    save_weights(module.model, task.backbone(module.model), weights, datamodule.class_names)
    record = {
        "config": OmegaConf.to_container(config, resolve=True),
        "environment": describe_environment(),
        "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "final": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "skipped": sorted(module.skipped),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    with replace_file(folder / "training.json") as stream:
        stream.write(f"{json.dumps(record, indent=1)}\n".encode())
    print(f"wrote {weights} and training.json beside it")
    return folder


class WeightEMA(WeightAveraging):
    """Exponential moving average of the weights: average = decay · average + (1 - decay) · weights at every step.

    PyTorch's reads a counter from the device at every step: it waits for the step instead of preparing the next one.
    """

    def __init__(self, decay: float, device: torch.device) -> None:
        super().__init__(device=device)
        self._decay = decay

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            self._average_model.update_parameters = partial(self._update, self._average_model.module)  # type: ignore[method-assign]

    @torch.no_grad()
    def _update(self, average: nn.Module, model: nn.Module) -> None:
        pairs = zip((*average.parameters(), *average.buffers()), (*model.parameters(), *model.buffers()), strict=True)
        averaged, current = [], []
        for own, new in pairs:
            if own.is_floating_point():
                averaged.append(own.detach())
                current.append(new.detach())
            else:
                own.copy_(new)
        torch._foreach_lerp_(averaged, current, 1 - self._decay)


def check_resume(checkpoint: str, module: LightningModule) -> None:
    """Raise a ``UserError`` unless the file is the checkpoint of a run of the same model."""
    path = Path(checkpoint)
    if not path.is_file():
        raise UserError(f"training.resume={path} does not exist: expected the last.ckpt of an earlier run.")
    try:  # unpickling a damaged file raises any exception
        stored = {key: value.shape for key, value in torch.load(path, "cpu", weights_only=False)["state_dict"].items()}
    except Exception as error:
        raise UserError(f"training.resume={path} is not the last.ckpt of an earlier run: {error!r}.") from error
    expected = {key: value.shape for key, value in module.state_dict().items()}
    if stored != expected:
        differ = sorted(key for key in stored.keys() | expected.keys() if stored.get(key) != expected.get(key))
        raise UserError(
            f"training.resume={path} is of another model: {len(differ)} parameters differ, {differ[0]} for one. "
            "Give the backbone the geometry, and the dataset the classes, of that run."
        )


def save_weights(model: nn.Module, backbone: Backbone, path: Path, label_names: Sequence[str] | None) -> None:
    """Store a model's parameters in half precision, with the names of its classes and its patch grid if not square."""
    state = {
        name: value.detach().to("cpu", torch.float16 if value.is_floating_point() else value.dtype).contiguous()
        for name, value in model.state_dict().items()
    }
    metadata = {"label_names": json.dumps(label_names)} if label_names else {}
    rows, columns = backbone.layouts()[0].grid
    if rows != columns:  # a reader assumes a square; and the order of two entries would change the file's hash
        metadata["grid_size"] = json.dumps([rows, columns])
    with replace_file(path) as stream:
        stream.write(save(state, metadata or None))
