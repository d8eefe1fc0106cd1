"""Run a Hydra program: exit code 0 done, 2 the user's mistake (one clear message, no traceback), 1 anything else."""

import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from mtr_lab.configuration import CONF
from mtr_lab.errors import UserError, unknown


def run_program(config_name: str, task: Callable[[DictConfig], object]) -> None:
    """Compose ``conf/<config_name>.yaml`` with the command line's overrides and call ``task`` with it."""

    def guarded(config: DictConfig) -> None:
        try:
            task(config)
        except (UserError, OmegaConfBaseException) as error:
            _exit(error)

    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own affair with new versions of PyTorch
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors arrive here instead of being printed as a traceback
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)()
    except (HydraException, OmegaConfBaseException) as error:
        _exit(_explain(error, config_name))


def _explain(error: Exception, config_name: str) -> Exception:
    """Hydra's composition errors in terms of what may be chosen."""
    text = str(error)
    if isinstance(error, MissingConfigException) and (match := re.search(r"Could not find '(\w+)/([^']*)'", text)):
        group, name = match.groups()
        if (CONF / group).is_dir():
            return unknown(group, name, [path.stem for path in (CONF / group).glob("*.yaml")])
    if match := re.search(r"Could not override '([^']*)'", text):
        return unknown("key", match[1], _keys(config_name), "The option --cfg job prints them all.")
    if isinstance(error, OverrideParseException):
        return UserError(f"cannot parse the override {error.override!r}: {error.message}")
    return UserError(text)


def _keys(config_name: str) -> list[str]:
    """All keys of a program's default configuration, dotted, and its groups."""

    def flatten(node: DictConfig, prefix: str) -> list[str]:
        keys = []
        for key in map(str, node):
            child = node._get_node(key)
            keys += flatten(child, f"{prefix}{key}.") if isinstance(child, DictConfig) else [prefix + key]
        return keys

    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose(config_name)
    return [*flatten(config, ""), *(path.name for path in CONF.iterdir() if path.is_dir())]


def _exit(error: Exception) -> NoReturn:
    print(f"mtr_lab: {error}", file=sys.stderr)
    raise SystemExit(2)
