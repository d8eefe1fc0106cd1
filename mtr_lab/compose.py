"""From a composed configuration to a model, data and a Lightning trainer."""

import logging
from typing import Any

import lightning
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from timm.data import resolve_model_data_config

from mtr_lab.backbones import VisionMamba, create_model
from mtr_lab.data import ImageDataModule
from mtr_lab.errors import UserError


def make_model(config: DictConfig, **changes: Any) -> VisionMamba:
    """The model of the ``backbone`` group; keys that are null keep the model's own values."""
    settings: dict[Any, Any] = {**config, **changes}
    arguments = {key: value for key, value in settings.items() if key != "name" and value is not None}
    return create_model(settings["name"], **arguments)


def make_outline(config: DictConfig) -> VisionMamba:
    """The same model without memory or weights, to check the rest of a configuration against."""
    with torch.device("meta"):
        return make_model(config)


def make_datamodule(config: DictConfig, model: VisionMamba, **arguments: Any) -> ImageDataModule:
    """The data of the ``dataset`` group, preprocessed as the model's weights expect."""
    return _instantiate("dataset", config, data_config=resolve_model_data_config(model), **arguments)


def make_trainer(config: DictConfig, **arguments: Any) -> lightning.Trainer:
    """The trainer of the ``trainer`` group.

    Raises:
        UserError: the device asked for is absent, or Lightning refuses the configuration.
    """
    check_device(config)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no advertisement of devices and products
    return _instantiate("trainer", config, **arguments)


def make_loggers(config: DictConfig) -> list[Logger]:
    """The loggers of the ``logger`` group, any number of them, by name."""
    return [_instantiate(f"logger.{name!s}", logger) for name, logger in config.items()]


def _instantiate(name: str, config: DictConfig, **arguments: Any) -> Any:
    try:
        return instantiate(config, **arguments)
    except InstantiationException as error:  # Hydra wraps whatever the constructor raises
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        raise UserError(f"{name}: {error.__cause__ or error}") from error


def check_device(config: DictConfig) -> None:
    """Raise a ``UserError`` if the ``trainer`` group asks for a device this machine does not have."""
    wants_gpu = config.accelerator in ("gpu", "cuda")
    if wants_gpu and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator={config.accelerator}: no CUDA device is present. "
            "Use trainer.accelerator=cpu, or auto to take what there is."
        )
    if wants_gpu and isinstance(config.devices, int) and config.devices > torch.cuda.device_count():
        raise UserError(f"trainer.devices={config.devices}: {torch.cuda.device_count()} CUDA devices are present.")
