"""Run a program that Hydra configures: compose its configuration, check it, call one function with it.

Exit code 0: done; 2: the user's mistake, with one message and no traceback; 128 + n: ended by signal n; 1: any other
error. This module does not import PyTorch, which takes seconds: ``--help``, ``--cfg``, completion and mistyped names
are answered before that.
"""

import contextlib
import os
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mtr_lab import __version__
from mtr_lab.cli import folders as folders  # registers the resolvers of the configuration
from mtr_lab.cli.commented_config import read_comments, to_commented_yaml
from mtr_lab.cli.completion import answer_completion
from mtr_lab.cli.extras import check_extras
from mtr_lab.cli.help_pages import Program, end_quietly_without_a_reader, help_page, preset_program
from mtr_lab.cli.overrides import check_numbers, explain_composition, is_override, stray_word, unknown_option
from mtr_lab.cli.ray_launcher import RayLauncher
from mtr_lab.cli.settings import check_settings, choose_budget, default_settings, setting_names
from mtr_lab.cli.signals import exit_at_signals
from mtr_lab.cli.streams import print_in_any_encoding, stop_printing
from mtr_lab.cli.targets import check_files, check_overrides
from mtr_lab.configuration import CONF
from mtr_lab.errors import UserError, machine_error, one_line, unknown, user_errors
from mtr_lab.policy_files import policy_files, policy_name

PLUGIN_EXTRAS = {
    "joblib": "joblib",
    "submitit_local": "slurm",
    "submitit_slurm": "slurm",
    "optuna": "optuna",
}
"""Hydra's plugins, and the extra that installs each."""


def run_program(program: Program) -> None:
    """Compose the program's configuration with the command line's overrides and call its function with it."""
    print_in_any_encoding()
    arguments = sys.argv[1:]
    if arguments == ["--version"]:  # Hydra would print its own
        print(f"mtr_lab {__version__}")
        return
    if answer_completion():
        return
    if "-sc" not in arguments:
        with exit_with_message():
            if _answer(program, arguments):
                return
    started = False

    def guarded(config: DictConfig) -> object:
        nonlocal started
        started = True
        # In a sweep mtr_lab.sweep.Jobs notes the mistake and goes on.
        alone = HydraConfig.get().mode != RunMode.MULTIRUN
        with exit_with_message() if alone else contextlib.nullcontext():
            choices = HydraConfig.get().runtime.choices
            _check_preset(choices, program.config_name, config_folders())
            check_settings(config, default := default_settings(program.config_name))
            choose_budget(config, default)
            _name_policy(config, choices)
            if program.check is not None:
                program.check(config)
            check_extras(config)
            print_on_rank_zero(f"{program.announce(config)}; writing to {HydraConfig.get().runtime.output_dir}")
            return pkgutil.resolve_name(program.function)(config)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing a traceback
    Plugins.instance().register(RayLauncher)
    with exit_at_signals():
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=program.config_name)(guarded)()
        except Exception as error:
            composing = isinstance(error, HydraException | OmegaConfBaseException)
            if started and not composing:
                raise
            if isinstance(error, OSError) and not composing:
                where = "cannot write the run folder (hydra.run.dir; of a sweep, hydra.sweep.dir): "
                _exit(f"{where}{error}", 1 if error.errno in (ENOSPC, EDQUOT) else 2)
            _exit(_explain(error, program.config_name, [word for word in sys.argv[1:] if is_override(word)]))


def _answer(program: Program, arguments: Sequence[str]) -> bool:
    """Answer ``--help`` and ``--cfg job``, and put the options before the overrides, as Hydra wants them.

    Returns:
        whether it was answered.

    Raises:
        UserError: an option that does not exist, an argument that is neither option nor override, a bad folder.
    """
    overrides = [argument for argument in arguments if is_override(argument)]
    words = [argument for argument in arguments if not is_override(argument)]
    options, unknown_options = get_args_parser().parse_known_args(words)
    if options.help:
        end_quietly_without_a_reader()
        print(help_page(program, options.config_dir and Path(options.config_dir)))
        return True
    if unknown_options:
        after = arguments[arguments.index(unknown_options[0]) + 1 :][:1]
        value = next((word for word in after if word in options.overrides), None)
        raise unknown_option(unknown_options[0], value, setting_names(program.config_name))
    if options.overrides:
        place = arguments.index(options.overrides[0])
        raise stray_word(arguments[place], arguments[place - 1] if place else None)
    folder = Path(options.config_dir) if options.config_dir else None
    _check_config_dir(folder)
    check_overrides(overrides)
    check_numbers(overrides)
    for searched in (options.config_path, *re.findall(r"file:/*(/[^\s,\]'\"]*)", " ".join(overrides))):
        if searched is not None:
            check_files(Path(searched))
    if options.cfg == "job" and not options.config_name and not options.config_path:
        end_quietly_without_a_reader()
        print(show_config(program.config_name, overrides, folder, options.package, options.resolve))
        return True
    sys.argv[1:] = [*words, *overrides]
    return False


def show_config(
    config_name: str,
    overrides: Sequence[str],
    config_dir: Path | None = None,
    package: str | None = None,
    resolve: bool = False,
) -> str:
    """What ``--cfg job`` prints: the composed configuration as YAML with the comments of its files.

    Args:
        config_dir: see :func:`compose`.
        package: print the settings below this key alone.
        resolve: replace interpolations by their values.

    Raises:
        UserError: the overrides do not fit.
    """
    config, choices = _compose(config_name, overrides, config_dir)
    comments = read_comments(config_name, choices, [CONF] if config_dir is None else [CONF, config_dir])
    if package in (None, "_global_"):
        return to_commented_yaml(config, comments, resolve)
    part = OmegaConf.select(config, str(package))
    if not isinstance(part, DictConfig):
        raise unknown("package", package, [key for key in map(str, config) if isinstance(config[key], DictConfig)])
    within = {
        key.removeprefix(f"{package}."): comment for key, comment in comments.items() if key.startswith(f"{package}.")
    }
    return f"# @package {package}\n{to_commented_yaml(part, within, resolve)}"


def print_on_rank_zero(line: str) -> None:
    """Print a line to stdout, on rank 0 alone. Progress goes to stdout, errors go to stderr."""
    if is_rank_zero():
        print(line, flush=True)


def is_rank_zero() -> bool:
    """Whether this is the first of the processes that torchrun or SLURM has started, or the only one."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """End the program with one message: with code 2 at a mistake of the user, with 1 if the machine lacks something."""
    try:
        yield
    except user_errors() as error:
        _exit(error)
    except Exception as error:
        message = machine_error(error)
        if message is None:
            raise
        stop_printing()
        _exit(" ".join([message, *getattr(error, "__notes__", [])]), 1)


def compose(config_name: str, overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """Compose and check ``conf/<config_name>.yaml`` with overrides.

    Args:
        config_dir: a folder of the user's with more files for the groups, as Hydra's ``--config-dir``.

    Raises:
        UserError: the overrides do not fit; names what was expected.
    """
    return _compose(config_name, overrides, config_dir)[0]


def _compose(
    config_name: str, overrides: Sequence[str], config_dir: Path | None
) -> tuple[DictConfig, Mapping[str, Any]]:
    """The configuration, and the file chosen in each group."""
    check_numbers(overrides)
    _check_config_dir(config_dir)
    own = []
    if config_dir is not None:
        path = QuotedString(f"file://{config_dir.absolute()}", Quote.single).with_quotes()
        own = [f"hydra.searchpath=[{path}]"]
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra.compose(config_name, [*own, *overrides], return_hydra_config=True)
            default = default_settings(config_name)
    except Exception as error:  # of odd values Hydra raises anything
        raise UserError(str(_explain(error, config_name, overrides))) from error
    choices = config.hydra.runtime.choices
    with open_dict(config):
        del config["hydra"]
    _check_preset(choices, config_name, [] if config_dir is None else [config_dir])
    check_settings(config, default)
    choose_budget(config, default)
    _name_policy(config, choices)
    return config, choices


def config_folders() -> list[Path]:
    """The user's configuration folders in the running program: ``--config-dir``, ``hydra.searchpath``."""
    if not HydraConfig.initialized():
        return []
    sources = HydraConfig.get().runtime.config_sources
    return [Path(source.path) for source in sources if source.schema == "file" and Path(source.path) != CONF]


def _check_config_dir(folder: Path | None) -> None:
    """Raise a ``UserError`` if the folder does not exist, or a file in it has the name of one of the package's."""
    if folder is None:
        return
    if not os.path.isdir(folder):
        raise UserError(f"--config-dir={folder}: the folder does not exist.")
    for ours in CONF.rglob("*.yaml"):
        file = folder / ours.relative_to(CONF)
        if file.exists() and not file.samefile(ours):
            raise UserError(f"{file}: mtr_lab has a file of that name, which hides yours. Give yours another name.")
    check_files(folder)
    policy_files([folder])


def _check_preset(choices: Mapping[str, Any], config_name: str, folders: Sequence[Path]) -> None:
    """Raise a ``UserError`` if the chosen ``experiment`` is for another program."""
    name = choices.get("experiment")
    for file in (folder / "experiment" / f"{name}.yaml" for folder in (CONF, *folders)):
        if file.is_file() and preset_program(file) not in (None, config_name):
            command = "train" if config_name == "config" else "eval"
            raise UserError(f"experiment={name} is a preset of {command}. Type mtr-lab {command} experiment={name} …")


def _name_policy(config: DictConfig, choices: Mapping[str, Any]) -> None:
    """Set ``mtr.policy`` to the name of the policy's file.

    Raises:
        UserError: it is another name, or a group has several files, of which Hydra would make a mixture.
    """
    for group, key in (("backbone", "backbone"), ("dataset", "dataset"), ("task", "task"), ("reduction", "mtr")):
        if key in config and group not in choices:
            raise UserError(f"{group}: expected one name; for several in turn type -m {group}=NAME,NAME")
    if "mtr" in config:
        config.mtr.policy = policy_name(choices["reduction"], config.mtr.policy)


def _explain(error: Exception, config_name: str, overrides: Sequence[str]) -> Exception:
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
    return explain_composition(error, overrides, lambda: setting_names(config_name))


def _exit(message: object, code: int = 2) -> NoReturn:
    print(f"mtr_lab: {message if isinstance(message, UserError | str) else one_line(message)}", file=sys.stderr)
    raise SystemExit(code)
