"""Reading one run of a report: its result, the sample for paired differences, its pictures."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mtr_lab.errors import UserError
from mtr_lab.image_file import reason
from mtr_lab.report.dashboard.thumbnails import thumbnail
from mtr_lab.results import predictions_file
from mtr_lab.results.comparison import Sample
from mtr_lab.results.predictions import name_of
from mtr_lab.results.predictions_file import load_predictions
from mtr_lab.results.schema import PICTURES, Result, read_result
from mtr_lab.results.smaller_model import beside

PICTURE_BYTES = 16 << 20
"""Larger files are not read."""
_PICTURE_TYPES = (".png", ".gif")


@dataclass(frozen=True)
class Run:
    """A run folder as it was read."""

    name: str  # unique within a report
    result: Result
    sample: Sample | None
    pictures: list[dict[str, str]]  # name and data URI of a thumbnail
    notes: list[str]
    folder: Path


def read_run(file: Path, name: str) -> Run:
    """Read a result file, and the predictions beside it; for pictures see ``with_pictures``.

    Raises:
        UserError: it is not a result. Predictions that cannot be used become a note instead.
    """
    result, notes, sample = read_result(file), [], None
    names = [name_of(point) for point in result["points"]]
    if (file.parent / predictions_file.FILE_NAME).exists():
        try:
            sample = Sample.of(load_predictions(file.parent))
            if sample.points != names:
                raise UserError(f"its {predictions_file.FILE_NAME} has the points {', '.join(sample.points)}.")
        except UserError as error:
            sample = None
            notes.append(f"{name} is not in the paired differences: {error}")
    return Run(name, result, sample, [], notes, file.parent)


def with_pictures(run: Run, file: Path) -> Run:
    """The run with thumbnails of the pictures beside its result file; those that cannot be used become notes."""
    name, pictures, notes = run.name, [], list(run.notes)
    for path in _pictures(file):
        if path.is_symlink() or path.parent.is_symlink():  # to any file of this machine, and reports are passed on
            notes.append(f"{name}: {path.name} is left out because it is a link.")
            continue
        try:
            if path.stat().st_size > PICTURE_BYTES:
                notes.append(f"{name}: {path.name} is left out because it is larger than {PICTURE_BYTES >> 20} MiB.")
                continue
            uri = thumbnail(path)
        except Exception as error:  # damaged bytes make Pillow raise anything from OSError to struct.error
            notes.append(f"{name}: {path.name} is left out because it cannot be read: {reason(error).rstrip('.')}.")
            continue
        pictures.append({"name": path.stem, "uri": uri})
    return replace(run, pictures=pictures, notes=notes)


def smaller_models(runs: Sequence[Run]) -> list[Run]:
    """Every unreduced model as a line in the figures of each larger model that was reduced, on the same images.

    Of several runs of a model, the first; only of classification, whose predictions are compared in pairs.
    """
    models: dict[tuple[str, ...], Run] = {}
    for run in runs:
        if run.sample is not None:
            result, weights = run.result, json.dumps(run.result.get("weights"), sort_keys=True)
            images = hashlib.blake2b(run.sample.hashes.tobytes()).hexdigest()
            models.setdefault((result["task"], result["dataset"], images, result["backbone"], weights), run)
    reduced = {
        (run.result["backbone"], json.dumps(run.result.get("weights"), sort_keys=True))
        for run in runs
        if len(run.result["points"]) > 1
    }
    lines = []
    for (*data, name, weights), large in models.items():
        if (name, weights) not in reduced:
            continue
        for (*other, smaller, _), small in models.items():
            if other == data and smaller != name and _flops(small) < _flops(large):
                pair = (large.result, load_predictions(large.folder), small.result, load_predictions(small.folder))
                try:
                    result, predictions = beside(*pair)
                except ValueError:  # other classes
                    continue
                lines.append(
                    Run(f"{small.name} beside {large.name}", result, Sample.of(predictions), [], [], small.folder)
                )
    return lines


def _flops(run: Run) -> float:
    return run.result["points"][0]["flops_true"] or 0.0


def file_stamp(file: Path) -> list[tuple[str, int, int]]:
    """A value that changes when a file of the run changes: name, time of modification (ns) and size (bytes) of each."""
    files = [path for path in (file, file.parent / predictions_file.FILE_NAME, *_pictures(file)) if path.exists()]
    return [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files]


def _pictures(file: Path) -> list[Path]:
    files = (file.parent / PICTURES).glob("*")
    return sorted((path for path in files if path.suffix in _PICTURE_TYPES and path.is_file()), key=natural_order)


def natural_order(path: Path) -> list[str | int]:
    """A sort key that orders numbers in names by value, 9 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]
