"""Read policies from YAML files, the package's in conf/reduction and the user's; a policy has the name of its file.

This module does not import PyTorch.
"""

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from mtr_lab.configuration import CONF
from mtr_lab.errors import UserError, one_line, unknown

PACKAGE = CONF / "reduction"
UNREDUCED = "none"
"""The name of the unreduced model in results, which no policy may have."""


def policy_files(folders: Iterable[Path] = ()) -> dict[str, Path]:
    """The files of all policies by name: the package's, and those in the folder ``reduction`` of the user's folders.

    Raises:
        UserError: a file of the user has the name of a policy of the package.
    """
    users = [file for folder in folders for file in sorted(folder.glob("reduction/*.yaml"))]
    for file in users:
        _check_file_name(file)
    return {file.stem: file for file in [*sorted(PACKAGE.glob("*.yaml")), *users]}


def find_policy(policy: str | Path) -> Path:
    """The file of a policy: of the package by its name, of the user by its path.

    Raises:
        UserError: an unknown name.
    """
    if str(policy).endswith((".yaml", ".yml")):
        return Path(os.path.expanduser(policy))
    files = policy_files()
    if str(policy) not in files:
        raise unknown("policy", policy, files, f"Available: {', '.join(files)}; or a file that ends in .yaml.")
    return files[str(policy)]


def read_policy(file: Path) -> dict[str, Any]:
    """The settings of a policy: its file, on top of the files in its defaults list, beside it or in the package.

    Raises:
        UserError: the file cannot be read, has the name of another policy, or does not contain settings of a policy.
    """
    _check_file_name(file)
    config = _read(file)
    missing = [key for key in _settings() if key not in config]
    if missing:
        raise UserError(f"{file} lacks {', '.join(missing)}: begin with defaults: [mtr, _self_].")
    return {**config, "policy": policy_name(file.stem, config["policy"])}


def policy_name(chosen: str, given: str | None) -> str:
    """The name of the selected policy, which is that of its file.

    Args:
        chosen: the file, as selected in its config group.
        given: the setting ``policy``, ``None`` if it is not set.

    Raises:
        UserError: the setting is another name.
    """
    name = Path(chosen).name.removesuffix(".yaml")
    if given not in (None, name):
        raise UserError(
            f"mtr.policy={given} only labels the result: choose the policy with reduction=, now {name}. "
            "Leave policy out of a policy's file: the file's name is the policy's name."
        )
    return name


def _check_file_name(file: Path) -> None:
    if file.stem == UNREDUCED:
        raise UserError(f"{file}: results call the unreduced model {UNREDUCED}. Give the policy's file another name.")
    ours = PACKAGE / f"{file.stem}.yaml"
    if ours.exists() and file.exists() and not ours.samefile(file):
        raise UserError(f"{file}: mtr_lab has a policy called {file.stem}. Give the file another name.")


def _read(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a file on top of its defaults; ``above`` are the files whose defaults lead to it."""
    if file in above:
        raise UserError(f"{file} builds on itself: {' → '.join(path.stem for path in (*above, file))}.")
    settings = _load(file)
    bases = settings.pop("defaults", [])
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"defaults in {file}: expected a list of policies and _self_, got {bases!r}.")
    config: dict[str, Any] = {}
    for base in bases if "_self_" in bases else [*bases, "_self_"]:  # as in Hydra, the file comes last by default
        config |= settings if base == "_self_" else _read(_base(file, base), (*above, file))
    for key in settings:
        if key not in _settings():
            raise unknown(f"key in {file}", key, _settings())
    return config


@cache
def _settings() -> tuple[str, ...]:
    """The keys of a policy."""
    return tuple(_load(PACKAGE / "mtr.yaml"))


def _base(file: Path, name: str) -> Path:
    beside, ours = file.parent / f"{name}.yaml", PACKAGE / f"{name}.yaml"
    if beside.exists():
        _check_file_name(beside)
        return beside
    if not ours.exists():
        names = {path.stem for path in [*file.parent.glob("*.yaml"), *PACKAGE.glob("*.yaml")]} - {file.stem}
        raise unknown(f"policy in the defaults of {file}", name, names)
    return ours


def _load(file: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf  # here, to keep the import of the library fast
    from omegaconf.errors import OmegaConfBaseException

    from mtr_lab.plain_yaml import read_yaml

    read_yaml(file)
    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"the policy {file} is not valid: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a policy: expected settings like those of {PACKAGE / 'mtr.yaml'}.")
    return {str(key): value for key, value in content.items()}
