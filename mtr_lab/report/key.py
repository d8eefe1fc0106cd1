"""What makes two evaluations the same: the configuration that matters, the code, the weights, the data."""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

import torch

NO_MATTER = (
    "resume",
    "objective",
    "logger",
    "backbone.checkpoint",  # the weights' own hash is in the key, and the data's identity
    "backbone.revision",
    "dataset.root",
    "dataset.num_workers",
    "trainer.enable_progress_bar",
)
"""Settings that do not change what a result says."""
_REDUCED_ONLY = ("mtr", "timing", "seed")
_PACKAGE = Path(__file__).resolve().parents[1]


class Key(TypedDict):
    """Hashes (hex); results with equal keys are of the same evaluation."""

    config: str  # the resolved configuration but for NO_MATTER
    code: str  # the package's own source files, and the version of PyTorch
    weights: str
    data: str


def point_key(config: dict[str, Any], weights: str | None, data: str) -> Key:
    """The key of an evaluation.

    Args:
        config: resolved, of plain dicts and lists.
        weights: SHA-256 of the file they came from; ``None``: random ones, which follow from the configuration.
        data: the identity of the evaluation images.
    """
    return {"config": _hash(_without(config, NO_MATTER)), "code": code(), "weights": weights or "random", "data": data}


def unreduced_key(config: dict[str, Any], weights: str | None, data: str, machine: Sequence[str]) -> str:
    """The key of the unreduced model's predictions, which no policy, no timing and, given weights, no seed changes.

    Args:
        machine: what else the last digit depends on: device, threads, the operations' implementation.
    """
    ignored = [*NO_MATTER, *(part for part in _REDUCED_ONLY if weights or part != "seed")]
    return _hash([_without(config, ignored), code(), weights, data, list(machine)])


@cache
def code() -> str:
    """A hash of the package's Python files as they are on disk, committed or not, and of PyTorch's version."""
    files = sorted(path for path in _PACKAGE.rglob("*.py"))
    return _hash([torch.__version__, *((path.relative_to(_PACKAGE).as_posix(), path.read_text()) for path in files)])


def _without(config: dict[str, Any], keys: Sequence[str], prefix: str = "") -> dict[str, Any]:
    return {
        key: _without(value, keys, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in config.items()
        if f"{prefix}{key}" not in keys
    }


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
