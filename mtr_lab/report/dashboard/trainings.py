"""The learning curves of training runs."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RECORD, METRICS = "training.json", "metrics.csv"


def training_files(paths: Iterable[Path]) -> list[Path]:
    """The records of training runs in folders, at any depth, that have a table of metrics beside them."""
    files = (file for path in paths if path.is_dir() for file in sorted(path.rglob(RECORD)))
    return [file for file in dict.fromkeys(files) if (file.parent / METRICS).is_file()]


def read_training(file: Path) -> dict[str, Any]:
    """A training run: ``name``, ``backbone``, ``task``, and by the name of a column ``curves`` of [epochs done, value].

    Raises:
        OSError, ValueError: a file cannot be read, or is not what a training run writes.
    """
    config = json.loads(file.read_text(encoding="utf-8"))["config"]
    curves: dict[str, list[list[float]]] = {}
    with open(file.parent / METRICS, encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            epoch = int(row["epoch"]) + 1
            for name, value in row.items():
                if name not in ("epoch", "step") and value:
                    curves.setdefault(name, []).append([epoch, float(value)])
    backbone, task = ((config.get(key) or {}).get("name", "") for key in ("backbone", "task"))
    return {"name": file.parent.name, "backbone": backbone, "task": task, "curves": curves}
