"""``python -m mtr_lab.train``: train a classifier; the run folder receives its weights, log and recipe."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mtr_lab import ops
from mtr_lab.backbones import VisionMamba
from mtr_lab.cli import run_program
from mtr_lab.compose import check_device, make_datamodule, make_loggers, make_model, make_outline, make_trainer
from mtr_lab.errors import UserError
from mtr_lab.report.environment import environment
from mtr_lab.tasks.training import ClassifierTraining

RANGES: dict[str, tuple[Any, float, float]] = {
    "epochs": (int, 1, 1e6),
    "lr": (int | float, 0, 10),
    "weight_decay": (int | float, 0, 10),
    "warmup_epochs": (int, 0, 1e6),
    "label_smoothing": (int | float, 0, 1),
    "mixup": (int | float, 0, 100),
    "cutmix": (int | float, 0, 100),
    "ema_decay": (int | float, 0, 1),
}


def train(config: DictConfig) -> Path:
    """Train what ``conf/train.yaml`` describes.

    Returns:
        The run folder. It holds ``model.safetensors`` (weights averaged over the last steps, half precision, class
        names in its metadata), ``last.ckpt`` to resume from, and ``training.json`` (recipe, final figures, SHA-256).

    Raises:
        UserError: anything in the configuration that cannot be carried out, before training starts.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    ops.set_backend(config.ops.backend)
    check_device(config.trainer)
    settings = config.training
    for key, (kind, least, most) in RANGES.items():
        value = settings[key]
        if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
            article = "an integer" if kind is int else "a number"
            raise UserError(f"training.{key}={value}: expected {article} from {least} to {most:g}.")
    if settings.resume is not None and not Path(settings.resume).is_file():
        raise UserError(f"training.resume={settings.resume} does not exist: expected the last.ckpt of an earlier run.")
    seed_everything(config.seed, workers=True, verbose=False)
    datamodule = make_datamodule(config.dataset, make_outline(config.backbone), seed=config.seed)
    model = make_model(config.backbone, num_classes=datamodule.num_classes)
    module = ClassifierTraining(
        model,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        warmup_epochs=settings.warmup_epochs,
        label_smoothing=settings.label_smoothing,
        mixup=settings.mixup,
        cutmix=settings.cutmix,
    )
    trainer = make_trainer(
        config.trainer,
        max_epochs=settings.epochs,
        logger=make_loggers(config.logger),
        callbacks=[ModelCheckpoint(dirpath=folder, filename="last", enable_version_counter=False)],
    )
    average = get_ema_multi_avg_fn(settings.ema_decay)
    # Left to itself, the average would stay on the CPU, where the model is when it is set up.
    trainer.callbacks.insert(0, WeightAveraging(device=trainer.strategy.root_device, multi_avg_fn=average))  # type: ignore[attr-defined]
    trainer.fit(module, datamodule=datamodule, ckpt_path=settings.resume, weights_only=False)

    weights = folder / "model.safetensors"
    save_weights(model, weights, datamodule.class_names)
    record = {
        "config": OmegaConf.to_container(config, resolve=True),
        "environment": environment(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "final": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {weights} and training.json beside it")
    return folder


def save_weights(model: VisionMamba, path: Path, label_names: Sequence[str] | None) -> None:
    """Store a model's parameters in half precision, with the names of its classes."""
    state = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in model.state_dict().items()}
    save_file(state, path, metadata={"label_names": json.dumps(label_names)} if label_names else None)


if __name__ == "__main__":
    run_program("train", train)
