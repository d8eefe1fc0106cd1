"""Configurations as the command line composes them, without composing each anew."""

from functools import cache

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from mtr_lab.cli import program

_compose = cache(program.compose)


def composed(program: str, *overrides: str) -> DictConfig:
    """``conf/<program>.yaml`` with overrides: choices of a group are composed once, values are then set."""
    parsed = OverridesParser.create().parse_overrides([*overrides])
    values = [override for override in parsed if "." in override.key_or_group]
    config = _compose(program, tuple(override.input_line for override in parsed if override not in values)).copy()
    OmegaConf.set_struct(config, False)
    for override in values:
        OmegaConf.update(config, override.key_or_group, override.value())
    return config
