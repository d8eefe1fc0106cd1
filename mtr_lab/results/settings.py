"""The settings by which results are told apart, out of a run's configuration."""

import json
from collections.abc import Iterator
from typing import Any

from mtr_lab.results.keys import IGNORED_KEYS

# What a point says itself, what runs are averaged over (see mtr_lab.results.seeds), or what changes nothing.
_IGNORED = (*IGNORED_KEYS, "mtr.ratio", "mtr.policy", "mtr.seed", "pictures")


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The settings of a config that may name a variant, as one would type them."""
    if prefix in _IGNORED:
        return
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, node if isinstance(node, str) else json.dumps(node)
