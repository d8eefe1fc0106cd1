"""Reading one run of a report: its result, the sample for paired differences, its pictures."""

import base64
import re
from dataclasses import dataclass
from pathlib import Path

from mtr_lab.errors import UserError
from mtr_lab.results import predictions_file
from mtr_lab.results.comparison import Sample
from mtr_lab.results.predictions import point_name
from mtr_lab.results.predictions_file import load_predictions
from mtr_lab.results.schema import PICTURES, Result, read_result

PICTURE_BYTES = 4 << 20
"""Larger pictures are not embedded."""
_PICTURE_TYPES = {".png": "image/png", ".gif": "image/gif"}


@dataclass(frozen=True)
class Run:
    """A run folder as it was read."""

    name: str  # unique within a report
    result: Result
    sample: Sample | None
    pictures: list[dict[str, str]]  # name and data URI
    notes: list[str]


def read_run(file: Path, name: str) -> Run:
    """Read a result file, and the predictions and pictures beside it.

    Raises:
        UserError: it is not a result. Predictions and pictures that cannot be used become notes instead.
    """
    result, notes, sample = read_result(file), [], None
    names = [point_name(point["policy"], point["ratio"], point.get("budget")) for point in result["points"]]
    if (file.parent / predictions_file.FILE_NAME).exists():
        try:
            sample = Sample.of(load_predictions(file.parent))
            if sample.points != names:
                raise UserError(f"its {predictions_file.FILE_NAME} is of the points {', '.join(sample.points)}.")
        except UserError as error:
            sample = None
            notes.append(f"{name} is not in the paired differences: {error}")
    pictures = []
    for path in _pictures(file):
        try:
            if path.stat().st_size > PICTURE_BYTES:
                notes.append(f"{name}: {path.name} is left out, it is larger than {PICTURE_BYTES >> 20} MiB.")
                continue
            content = base64.b64encode(path.read_bytes()).decode()
        except OSError as error:
            notes.append(f"{name}: {path.name} is left out, it cannot be read: {error.strerror}.")
            continue
        pictures.append({"name": path.name, "uri": f"data:{_PICTURE_TYPES[path.suffix]};base64,{content}"})
    return Run(name, result, sample, pictures, notes)


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
