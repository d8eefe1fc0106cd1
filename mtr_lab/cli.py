"""Run a Hydra program: exit code 0 done, 2 the user's mistake (one clear message, no traceback), 1 anything else.

Nothing here needs PyTorch, which takes seconds to import: what Hydra answers by itself (``--help``, ``--cfg``,
completion) and a mistake in the name of a key or a group are on the terminal before that.
"""

import argparse
import contextlib
import math
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mtr_lab import __version__
from mtr_lab.completion import answer_completion
from mtr_lab.configuration import CONF
from mtr_lab.errors import UserError, check_number, unknown
from mtr_lab.policy_files import policy_files, policy_name
from mtr_lab.sweep import user_errors

OPEN_GROUPS = ("dataset", "task", "trainer", "logger")
"""Groups whose keys are arguments of what their ``_target_`` names; more of them may be given than their files have."""
_OVERRIDE = re.compile(r"(\+{0,2}|~)[\w@/.]+=|~[\w@.]+$")

RANGES: dict[str, tuple[type[int] | type[float], float, float]] = {
    "seed": (int, 0, 2**32 - 1),
    "backbone.num_classes": (int, 1, math.inf),
    "timing.batch_size": (int, 0, math.inf),  # 0: no timing
    "timing.seconds": (float, 0, math.inf),
    "bench.seconds": (float, 0, math.inf),
    "pictures": (int, 0, math.inf),
    "training.epochs": (int, 1, math.inf),
    "training.lr": (float, 0, 10),
    "training.weight_decay": (float, 0, 10),
    "training.warmup_epochs": (int, 0, math.inf),
    "training.label_smoothing": (float, 0, 1),
    "training.mixup": (float, 0, 100),
    "training.cutmix": (float, 0, 100),
    "training.ema_decay": (float, 0, 1),
}
"""Ranges of the numeric settings that no constructor checks."""
OPTIONAL = ("backbone.num_classes",)

PLUGIN_EXTRAS = {
    "joblib": "joblib",
    "submitit_local": "slurm",
    "submitit_slurm": "slurm",
    "ray": "ray",
    "optuna": "optuna",
}
"""Hydra's plugins, and the extra each comes with."""


def run_program(config_name: str, function: str, announce: Callable[[DictConfig], str]) -> None:
    """Compose ``conf/<config_name>.yaml`` with the command line's overrides and call ``function`` with it.

    Args:
        function: ``module:function``; the module is imported once the overrides have been checked.
        announce: says in a line what the configuration asks for; printed before the import.
    """
    if sys.argv[1:] == ["--version"]:  # Hydra would state its own
        print(f"mtr_lab {__version__}")
        return
    if answer_completion():
        return
    with exit_on_user_error():
        _check_config_dir(_config_dir(sys.argv[1:]))
    started = False

    def guarded(config: DictConfig) -> object:
        nonlocal started
        started = True
        # mtr_lab.sweep.Jobs takes note of the mistakes in a sweep's points, and the sweep goes on.
        alone = HydraConfig.get().mode != RunMode.MULTIRUN
        with exit_on_user_error() if alone else contextlib.nullcontext():
            _check(config, hydra.compose(config_name))
            _name_policy(config, HydraConfig.get().runtime.choices)
            print_on_rank_zero(f"{announce(config)}; writing to {HydraConfig.get().runtime.output_dir}")
            return pkgutil.resolve_name(function)(config)

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


def print_on_rank_zero(line: str) -> None:
    """Print a line at once, in one process of several.

    To stdout, as all that says how a program gets on; stderr has nothing but what went wrong.
    """
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(line, flush=True)


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the program with code 2 and one message at a mistake in what was asked for."""
    try:
        yield
    except user_errors() as error:
        _exit(error)


def compose(config_name: str, overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """``conf/<config_name>.yaml`` with overrides, for programs that take other arguments too.

    Args:
        config_dir: a folder of the user's with more files for the groups, as Hydra's ``--config-dir``.

    Raises:
        UserError: the overrides do not fit; says what there is.
    """
    _check_config_dir(config_dir)
    own = []
    if config_dir is not None:
        path = QuotedString(f"file://{config_dir.absolute()}", Quote.single).with_quotes()
        own = [f"hydra.searchpath=[{path}]"]
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra.compose(config_name, [*own, *overrides], return_hydra_config=True)
            default = hydra.compose(config_name)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(str(_explain(error, config_name))) from error
    choices = config.hydra.runtime.choices
    with open_dict(config):
        del config["hydra"]
    _check(config, default)
    _name_policy(config, choices)
    return config


def config_folders() -> list[Path]:
    """The user's folders of configuration files in the program that runs: ``--config-dir``, ``hydra.searchpath``."""
    if not HydraConfig.initialized():
        return []
    sources = HydraConfig.get().runtime.config_sources
    return [Path(source.path) for source in sources if source.schema == "file" and Path(source.path) != CONF]


def _config_dir(arguments: Sequence[str]) -> Path | None:
    """The folder of Hydra's option ``--config-dir`` on a command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    parser.add_argument("--cfg", "-c")  # would be taken for the beginning of -cd
    folder: Path | None = parser.parse_known_args(arguments)[0].config_dir
    return folder


def _check_config_dir(folder: Path | None) -> None:
    """Raise a ``UserError`` if the folder does not exist, or one of its files would be hidden by one of the package."""
    if folder is None:
        return
    if not folder.is_dir():
        raise UserError(f"--config-dir={folder}: there is no such folder.")
    for ours in CONF.rglob("*.yaml"):
        file = folder / ours.relative_to(CONF)
        if file.exists() and not file.samefile(ours):
            raise UserError(f"{file}: mtr_lab has a file of that name, and would take it. Give yours another name.")
    policy_files([folder])


def _name_policy(config: DictConfig, choices: Mapping[str, Any]) -> None:
    """Call the policy what its file is called; a ``UserError`` if ``mtr.policy`` is something else."""
    if "mtr" in config:
        config.mtr.policy = policy_name(choices["reduction"], config.mtr.policy)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line's files and options, and its Hydra overrides (``key=value``, ``~key``), wherever they stand."""
    files: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        is_override = _OVERRIDE.match(argument) and not os.path.exists(argument)
        (overrides if is_override else files).append(argument)
    return files, overrides


def _explain(error: Exception, config_name: str) -> Exception:
    """Hydra's composition errors in terms of what may be chosen."""
    text = str(error)
    if match := re.search(r"Could not (?:find|load) 'hydra/(launcher|sweeper)/([^']*)'", text):
        group, name = match.groups()
        if name in PLUGIN_EXTRAS:
            return UserError(f"hydra/{group}={name} needs an extra: pip install 'mtr-lab[{PLUGIN_EXTRAS[name]}]'.")
        own = [path.stem for path in (CONF / "hydra" / group).glob("*.yaml")]
        return unknown(f"hydra/{group}", name, ["basic", *own, *PLUGIN_EXTRAS])
    if isinstance(error, MissingConfigException) and (match := re.search(r"Could not find '(\w+)/([^']*)'", text)):
        group, name = match.groups()
        if error.options:
            return unknown(group, name, error.options)
    if match := re.search(r"Could not override '([^']*)'", text):
        return unknown(
            "key",
            match[1],
            _keys(config_name),
            "python -m mtr_lab --cfg job prints them all (so do .train and .bench).",
        )
    if isinstance(error, OverrideParseException):
        return UserError(f"cannot parse the override {error.override!r}: {error.message}")
    return UserError(text)


def _check(config: DictConfig, default: DictConfig) -> None:
    """Refuse keys that were added to what a program reads, or taken from it, and the wrong kind of number or switch."""
    keys, known = _flatten(config, whole=OPEN_GROUPS), _flatten(default, whole=OPEN_GROUPS)
    for key in keys:
        if key.startswith("reduction."):
            raise UserError(f"{key}: a file in reduction/ has to begin with the line '# @package mtr'.")
        if key not in known:
            raise unknown("key", key, known, "python -m mtr_lab --cfg job prints them all (so do .train and .bench).")
    for key in known:
        if key not in keys:
            raise UserError(f"the key {key} is missing: set it to a value, it cannot be left out.")
    _check_numbers(config)


def _check_numbers(config: DictConfig) -> None:
    """Raise a ``UserError`` for a number of ``RANGES``, or a switch, that is not as it has to be."""
    missing = object()
    for key, (kind, least, most) in RANGES.items():
        value = OmegaConf.select(config, key, default=missing)
        if value is not missing and not (value is None and key in OPTIONAL):
            check_number(key, value, kind, least, most)
    if not isinstance(config.get("resume", True), bool):
        raise UserError(f"resume={config.resume}: expected true or false.")


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
