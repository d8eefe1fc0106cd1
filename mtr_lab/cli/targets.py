"""What a configuration may name to be called (``_target_``): the parts of this program, and nothing else.

A configuration is data: a file or a line from somebody else must not run code.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mtr_lab.errors import UserError
from mtr_lab.plain_yaml import read_yaml

_ALLOWED = re.compile(
    r"mtr_lab\.(data\.\w+|report\.loggers\.\w+|sweep\.Jobs)"
    r"|lightning\.(pytorch\.)?Trainer"
    r"|lightning\.pytorch\.(callbacks|loggers|plugins|profilers|strategies)\.[A-Z]\w*"
    r"|hydra\._internal\.core_plugins\.\w+\.[A-Z]\w*"
    r"|hydra_plugins\.\w+(\.\w+)*\.[A-Z]\w*"
    r"|optuna\.samplers\.[A-Z]\w*"
)
_FACTORIES = ("colorlog.ColoredFormatter",)
"""What the logging that Hydra configures may call, under the key ``()``."""


def check_targets(node: Any, where: str = "") -> None:
    """Raise a ``UserError`` if a configuration, resolved into plain containers, names anything else to be called.

    Args:
        where: the file, or the key of the node, for the message.
    """
    if isinstance(node, str) and "_target_" in node:  # an interpolation may turn a text into a node
        raise UserError(f"{where}: a text with _target_ in it may not be part of a configuration: {node!r}.")
    if isinstance(node, list):
        for item in node:
            check_targets(item, where)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        name = f"{where}.{key}".lstrip(".")
        if key == "_target_" and not (isinstance(value, str) and _ALLOWED.fullmatch(value)):
            raise UserError(
                f"{name}={value}: a configuration may name the data modules of mtr_lab.data, and the trainer, loggers, "
                "callbacks, plugins, profilers and strategies of lightning.pytorch. Call other code from Python: "
                "mtr_lab.evaluate_model takes your model and your data."
            )
        if key == "()" and value not in _FACTORIES:
            raise UserError(f"{name}={value}: logging may call only {', '.join(_FACTORIES)}.")
        if key != "_target_":
            check_targets(value, name)


def resolved(config: DictConfig) -> Any:
    """A configuration as plain containers. Before Hydra runs, what it tells of the run counts as empty."""
    if HydraConfig.initialized():
        return OmegaConf.to_container(config, resolve=True)
    text = re.sub(r"\$\{hydra:[^{}]*\}", "", OmegaConf.to_yaml(config))
    return OmegaConf.to_container(OmegaConf.create(text), resolve=True)


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise a ``UserError`` if an override names anything else, also for Hydra's own part of the configuration."""
    for override in overrides:
        targets = re.findall(r"""_target_["']?\s*[=:]\s*["']?([^\s,}\]"']*)""", override)
        if override.count("_target_") != len(targets) or "()" in override:
            raise UserError(f"{override}: expected _target_=NAME; logging is configured in a file.")
        for target in targets:
            check_targets({"_target_": target}, override.partition("=")[0].removesuffix("._target_").lstrip("+"))


def check_files(folder: Path) -> None:
    """The same for the YAML files in a folder of the user's.

    Raises:
        UserError: also for a file that is not plain YAML, see :func:`mtr_lab.plain_yaml.read_yaml`.
    """
    try:
        files = sorted(folder.rglob("*.yaml"))
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error}.") from error
    for file in files:
        check_targets(read_yaml(file), str(file))
