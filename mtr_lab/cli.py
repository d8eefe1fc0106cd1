"""Run a Hydra program: exit code 0 done, 2 the user's mistake (one clear message, no traceback), 1 anything else."""

import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from mtr_lab.configuration import CONF
from mtr_lab.errors import UserError, unknown
from mtr_lab.sweep import USERS_MISTAKES

OPEN = ("dataset", "trainer", "logger")
"""Groups whose keys are arguments of what their ``_target_`` names; more of them may be given than their files have."""

EXTRAS = {"joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm", "ray": "ray", "optuna": "optuna"}
"""Hydra's plugins, and the extra each comes with."""


def run_program(config_name: str, task: Callable[[DictConfig], object]) -> None:
    """Compose ``conf/<config_name>.yaml`` with the command line's overrides and call ``task`` with it."""
    started = False

    def guarded(config: DictConfig) -> object:
        nonlocal started
        started = True
        # Here, as a sweep's points may run in other processes. Lightning's own affair with new versions of PyTorch:
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        try:
            _check_keys(config, hydra.compose(config_name))
            return task(config)
        except USERS_MISTAKES as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # mtr_lab.sweep.Points takes note of it, and the sweep goes on
            _exit(error)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors arrive here instead of being printed as a traceback
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)()
    except (HydraException, OmegaConfBaseException) as error:
        _exit(_explain(error, config_name))
    except (OSError, ValueError) as error:
        if started:
            raise
        where = (
            "cannot write the run folder (hydra.run.dir; of a sweep, hydra.sweep.dir): "
            if isinstance(error, OSError)
            else ""
        )
        _exit(UserError(f"{where}{error}"))


def _explain(error: Exception, config_name: str) -> Exception:
    """Hydra's composition errors in terms of what may be chosen."""
    text = str(error)
    if match := re.search(r"Could not find 'hydra/(launcher|sweeper)/([^']*)'", text):
        group, name = match.groups()
        if name in EXTRAS:
            return UserError(f"hydra/{group}={name} needs an extra: pip install 'mtr-lab[{EXTRAS[name]}]'.")
        own = [path.stem for path in (CONF / "hydra" / group).glob("*.yaml")]
        return unknown(f"hydra/{group}", name, ["basic", *own, *EXTRAS])
    if isinstance(error, MissingConfigException) and (match := re.search(r"Could not find '(\w+)/([^']*)'", text)):
        group, name = match.groups()
        if (CONF / group).is_dir():
            return unknown(group, name, [path.stem for path in (CONF / group).glob("*.yaml")])
    if match := re.search(r"Could not override '([^']*)'", text):
        return unknown("key", match[1], _keys(config_name), "The option --cfg job prints them all.")
    if isinstance(error, OverrideParseException):
        return UserError(f"cannot parse the override {error.override!r}: {error.message}")
    return UserError(text)


def _check_keys(config: DictConfig, default: DictConfig) -> None:
    """Refuse keys that were added to what a program reads, or taken from it."""
    keys, known = _flatten(config, whole=OPEN), _flatten(default, whole=OPEN)
    for key in keys:
        if key not in known:
            raise unknown("key", key, known, "The option --cfg job prints them all.")
    for key in known:
        if key not in keys:
            raise UserError(f"the key {key} is missing: set it to a value, it cannot be left out.")


def _flatten(node: DictConfig, prefix: str = "", whole: Sequence[str] = ()) -> list[str]:
    """All keys below a node, dotted, but for those below the groups ``whole``."""
    keys = []
    for key in map(str, node):
        child = node._get_node(key)
        inner = isinstance(child, DictConfig) and not child._is_none() and key not in whole
        keys += _flatten(child, f"{prefix}{key}.", whole) if inner else [prefix + key]  # type: ignore[arg-type]
    return keys


def _keys(config_name: str) -> list[str]:
    """All keys of a program's default configuration, dotted, and its groups."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose(config_name)
    return [*_flatten(config), *(path.name for path in CONF.iterdir() if path.is_dir())]


def _exit(error: Exception) -> NoReturn:
    print(f"mtr_lab: {error}", file=sys.stderr)
    raise SystemExit(2)
