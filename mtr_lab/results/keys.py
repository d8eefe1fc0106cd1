"""Keys of evaluations: hashes of configuration, code, weights and data, by which a finished one is reused."""

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

IGNORED_KEYS = (
    "resume",
    "objective",
    "logger",
    "backbone.checkpoint",  # the key has the hash of the weights, and the fingerprint of the data
    "backbone.revision",
    "dataset.root",
    "dataset.num_workers",
    "dataset.cache",
    "trainer.strategy",
    "trainer.devices",  # the number of processes changes no figure
    "trainer.num_nodes",
    "trainer.trusted_network",
    "trainer.enable_progress_bar",
)
"""Settings that change no figure of a result."""
_REDUCED_ONLY = ("mtr", "timing", "pictures", "seed")
_PACKAGES = ("torch", "torchvision", "timm", "pillow", "numpy", "numba", "triton", "mamba-ssm", "causal-conv1d")
_PACKAGE = Path(__file__).resolve().parents[1]


class Key(TypedDict):
    """Hashes (hex); evaluations with equal keys give the same result."""

    config: str  # the resolved configuration without IGNORED_KEYS
    code: str  # the source files of mtr_lab, and the versions of _PACKAGES
    weights: str
    data: str
    machine: str  # on which speeds were measured; empty if none were


def evaluation_key(
    config: dict[str, Any], weights: str | None, data: Sequence[str | None], machine: Sequence[str]
) -> Key:
    """The key of an evaluation.

    Args:
        config: resolved, of plain dicts and lists.
        weights: SHA-256 of their file; ``None`` for random weights, which the configuration determines.
        data: fingerprints of the evaluation images, and of the images on which a schedule was measured.
        machine: what speeds depend on besides configuration and code; empty if none are measured.
    """
    return {
        "config": _hash(_without(config, IGNORED_KEYS)),
        "code": code_hash(),
        "weights": weights or "random",
        "data": _hash(list(data)),
        "machine": _hash(list(machine)) if machine else "",
    }


def unreduced_key(config: dict[str, Any], weights: str | None, data: str, machine: Sequence[str]) -> str:
    """The key of the unreduced model's predictions: independent of policy and timing, and of the seed given weights.

    Args:
        machine: what the last digit depends on besides: device, threads, the operations' implementation.
    """
    ignored = [*IGNORED_KEYS, *(part for part in _REDUCED_ONLY if weights or part != "seed")]
    return _hash([_without(config, ignored), code_hash(), weights, data, list(machine)])


@cache
def code_hash() -> str:
    """A hash of mtr_lab's Python files as they are on disk, committed or not, and of the versions of ``_PACKAGES``."""
    files = sorted(path for path in _PACKAGE.rglob("*.py"))
    versions = [_version(package) for package in _PACKAGES]
    return _hash(
        [versions, *((path.relative_to(_PACKAGE).as_posix(), path.read_text(encoding="utf-8")) for path in files)]
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _without(config: dict[str, Any], keys: Sequence[str], prefix: str = "") -> dict[str, Any]:
    return {
        key: _without(value, keys, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in config.items()
        if f"{prefix}{key}" not in keys
    }


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
