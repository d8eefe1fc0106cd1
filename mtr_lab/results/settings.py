"""The settings by which the runs of a report are told apart."""

import json
from collections.abc import Iterator
from typing import Any

from mtr_lab.results.keys import IGNORED_KEYS

MEASUREMENT = (*IGNORED_KEYS, "timing", "pictures", "trainer.limit_test_batches", "trainer.limit_train_batches")
"""Settings and groups that say how to measure, not what."""
# Points name their policy, budget and size of the picture, and runs are averaged over seeds.
_IGNORED = (*MEASUREMENT, *(f"mtr.{key}" for key in ("ratio", "speedup", "max_drop", "resolution", "policy", "seed")))


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The settings of a config that may name a variant: (dotted key, value), as typed on the command line."""
    if prefix in _IGNORED:
        return
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, node if isinstance(node, str) else json.dumps(node)


def is_measurement(key: str) -> bool:
    """Whether a setting, by its dotted key, says how to measure, not what."""
    return any(f"{key}.".startswith(f"{ignored}.") for ignored in MEASUREMENT)
