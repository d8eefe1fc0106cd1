"""The settings of a program: which keys it has, and the ranges of those that no constructor checks."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from mtr_lab.cli.overrides import ALL_KEYS
from mtr_lab.cli.targets import check_targets, resolved
from mtr_lab.configuration import CONF
from mtr_lab.errors import UserError, check_number, unknown

BUDGETS = ("mtr.ratio", "mtr.speedup", "mtr.max_drop")
"""The keys of which one says how much is removed."""
OPEN_GROUPS = ("dataset", "task", "trainer", "logger")
"""Groups whose keys are arguments of a constructor, which may take more than their files list."""


class Number(NamedTuple):
    """A number from ``least`` to ``most``; ``optional``: or null."""

    kind: type[int] | type[float]
    least: float
    most: float = math.inf
    optional: bool = False

    def check(self, key: str, value: object) -> None:
        """Raise a ``UserError`` unless the value fits."""
        if not (self.optional and value is None):
            check_number(key, value, self.kind, self.least, self.most)


class Switch(NamedTuple):
    """true or false."""

    def check(self, key: str, value: object) -> None:
        """Raise a ``UserError`` unless the value fits."""
        if not isinstance(value, bool):
            raise UserError(f"{key}={value}: expected true or false.")


class Share(NamedTuple):
    """A share of the FLOPs, or several; the solver says which are in reach, here only percentages are refused."""

    def check(self, key: str, value: object) -> None:
        """Raise a ``UserError`` if the value looks like a percentage."""
        for number in value if isinstance(value, ListConfig) else [value]:
            if isinstance(number, int | float) and 2 <= number <= 100:
                raise UserError(
                    f"{key} must be a share of the FLOPs in [0, 1), got {number}. "
                    f"For {number} % type {key}={number / 100:g}"
                )


class Several(NamedTuple):
    """A number between two limits, several in a list, or null."""

    above: float
    below: float
    expected: str

    def check(self, key: str, value: Any) -> None:
        """Raise a ``UserError`` unless the value fits."""
        values = list(value) if isinstance(value, ListConfig) else [] if value is None else [value]
        if isinstance(value, ListConfig) and not values:
            raise UserError(f"{key}=[]: expected {self.expected}, or null.")
        for number in values:
            fits = isinstance(number, int | float) and not isinstance(number, bool)
            if not fits or not self.above < number < self.below:
                raise UserError(f"{key}={number}: expected {self.expected}.")


SCHEMA: dict[str, Number | Switch | Share | Several] = {
    "seed": Number(int, 0, 2**32 - 1),
    "resume": Switch(),
    "pictures": Number(int, 0, 2**20),
    "backbone.num_classes": Number(int, 1, optional=True),
    "mtr.ratio": Share(),
    "mtr.speedup": Several(1, math.inf, "a number above 1, times as fast as the unreduced model"),
    "mtr.max_drop": Several(0, 1, "a fraction of the images in (0, 1), 0.01 for 1 %"),
    "trainer.cuda_graph": Switch(),
    "timing.batch_size": Number(int, 0, 2**20),  # 0: no timing
    "timing.seconds": Number(float, 0),
    "bench.seconds": Number(float, 0),
    "bench.ratio": Share(),
    "bench.speedup": Several(1, math.inf, "a number above 1, times as fast as the unreduced model"),
    "training.epochs": Number(int, 1),
    "training.lr": Number(float, 0, 10),
    "training.weight_decay": Number(float, 0, 10),
    "training.warmup_epochs": Number(int, 0),
    "training.ema_decay": Number(float, 0, 1),
    "training.ratio_warmup_epochs": Number(int, 0),
    "training.freeze_backbone": Switch(),
    "training.label_smoothing": Number(float, 0, 1),
    "training.mixup": Number(float, 0, 100),
    "training.cutmix": Number(float, 0, 100),
}
"""Settings of all programs; a program checks those it has."""


def check_settings(config: DictConfig, default: DictConfig) -> None:
    """Check a composed configuration against a program's default one, and against ``SCHEMA``.

    Raises:
        UserError: a key was added or deleted, a value does not fit, or foreign code is to be called.
    """
    keys, known = flatten(config, whole=OPEN_GROUPS), flatten(default, whole=OPEN_GROUPS)
    for key in keys:
        if key.startswith("reduction."):
            raise UserError(f"{key}: a file in reduction/ has to begin with the line '# @package mtr'.")
        if key not in known and key not in _of_backbone(config):
            raise unknown("key", key, known, ALL_KEYS)
    for key in known:
        if key not in keys:
            raise UserError(f"the key {key} is missing: set it to a value.")
    check_targets(resolved(config))
    absent = object()
    for key, setting in SCHEMA.items():
        value = OmegaConf.select(config, key, default=absent)
        if value is not absent:
            setting.check(key, value)


def _of_backbone(config: DictConfig) -> set[str]:
    """The settings that the file of the chosen backbone has besides those of all backbones."""
    file = CONF / "backbone" / f"{OmegaConf.select(config, 'backbone.name')}.yaml"
    return {f"backbone.{key!s}" for key in OmegaConf.load(file)} if file.is_file() else set()


def choose_budget(config: DictConfig, default: DictConfig) -> None:
    """Let the default ``mtr.ratio`` give way to another budget.

    Raises:
        UserError: several budgets were given.
    """
    given = [key for key in BUDGETS if OmegaConf.select(config, key) is not None]
    if len(given) > 1 and config.mtr.ratio == default.mtr.ratio:
        config.mtr.ratio = None
        given.remove("mtr.ratio")
    if len(given) > 1:
        pairs = " and ".join(f"{key}={OmegaConf.select(config, key)}" for key in given)
        raise UserError(f"{pairs}: give one of {', '.join(BUDGETS)}.")


@cache
def default_settings(config_name: str) -> DictConfig:
    """A program's configuration without overrides, read-only. Hydra has to be initialised."""
    config = hydra.compose(config_name)
    OmegaConf.set_readonly(config, True)
    return config


@cache
def setting_names(config_name: str) -> tuple[str, ...]:
    """The keys of a program's default configuration, dotted, and the groups."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = default_settings(config_name)
    return (*flatten(config), *(path.name for path in CONF.iterdir() if path.is_dir()))


def flatten(node: DictConfig, prefix: str = "", whole: Sequence[str] = ()) -> list[str]:
    """The keys below a node, dotted; nodes called as in ``whole`` count as one key."""
    keys = []
    for key in map(str, node):
        child = node._get_node(key)
        inner = isinstance(child, DictConfig) and not child._is_none() and key not in whole
        keys += flatten(child, f"{prefix}{key}.", whole) if inner else [prefix + key]  # type: ignore[arg-type]
    return keys
