"""The data of a report's page, read from results and kept up to date."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mtr_lab.errors import UserError
from mtr_lab.report.axes import axes
from mtr_lab.report.dashboard.points import differences_of, points_of, variants_of
from mtr_lab.report.dashboard.presets import changed_settings
from mtr_lab.report.dashboard.runs import Run, file_stamp, natural_order, read_run, smaller_models, with_pictures
from mtr_lab.report.dashboard.trainings import METRICS, read_training, training_files
from mtr_lab.report.looks import look
from mtr_lab.results.best_resolution import best_resolution
from mtr_lab.results.environment import hardware_name
from mtr_lab.results.schema import FILE_NAME, Point
from mtr_lab.results.seeds import seed_groups
from mtr_lab.results.settings import is_measurement

REPORT_PICTURE_BYTES = 8 << 20
"""The limit for all pictures of a report together."""


class Reader:
    """Reads results; each is read again only when one of its files has changed.

    Args:
        paths: result files, run folders, or folders that contain run folders at any depth.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._read: dict[Path, tuple[Any, Run]] = {}

    def stamp(self) -> Any:
        """A value that changes when a result appears, changes or disappears.

        Raises:
            UserError: a path does not exist.
        """
        curves = [(str(file), file.with_name(METRICS).stat().st_mtime_ns) for file in training_files(self.paths)]
        return [(name, file_stamp(file)) for file, name in self._files().items()], curves

    def data(self) -> dict[str, Any]:
        """The data of the page.

        Returns:
            ``axes`` of the charts; ``runs`` with their unchanged results; ``points``, which are places in these
            results, or means of points that differ only in the seed; paired ``differences`` between points;
            ``remarks`` on models, by task; ``notes`` that say what was left out, and why.

        Raises:
            UserError: a path does not exist, or a given file or run folder is not a result. A bad file within a given
                folder becomes a note instead.
        """
        runs, notes = [], []
        for file, name in self._files().items():
            stamp = (name, file_stamp(file))
            known, run = self._read.get(file, (None, None))
            if run is None or known != stamp:
                try:
                    run = with_pictures(read_run(file, name), file)
                except UserError as error:
                    if file in self.paths or file.parent in self.paths:
                        raise
                    notes.append(str(error))
                    continue
                self._read[file] = (stamp, run)
            runs.append(run)
            notes += run.notes
        runs += smaller_models(runs)
        seeds = seed_groups([run.result for run in runs])
        variants = variants_of(runs, seeds)
        shown = list(points_of(runs, seeds))
        differences, refused = differences_of(runs, shown)
        pictures, left_out = _within_budget(runs)
        trainings = []
        for file in training_files(self.paths):
            try:
                trainings.append(read_training(file))
            except (OSError, ValueError, KeyError, TypeError) as error:
                notes.append(f"the learning curve of {file.parent} is left out because it cannot be read: {error}")
        return {
            "written": datetime.now().astimezone().isoformat(timespec="seconds"),
            "axes": axes(),
            "looks": {policy: look(policy)._asdict() for policy in _policies(runs)},
            "runs": [
                {
                    "name": run.name,
                    "variant": variant,
                    "hardware": hardware_name(run.result["environment"]),
                    "paired": run.sample is not None,
                    "changed": changed_settings(run.result),
                    "result": run.result,
                    "pictures": embedded,
                }
                for run, variant, embedded in zip(runs, variants, pictures, strict=True)
            ],
            "points": shown,
            "trainings": trainings,
            "differences": differences,
            "remarks": _best_resolutions(runs),
            "notes": [*notes, *refused, *left_out],
        }

    def _files(self) -> dict[Path, str]:
        """Result files and the names of their runs: the folders from the given path on."""
        names: dict[Path, str] = {}
        for path in self.paths:
            if not os.path.exists(path):  # a name that is too long has none either
                raise UserError(f"{path} does not exist. Give {FILE_NAME} files, or folders that contain them.")
            for file in sorted(path.rglob(FILE_NAME), key=natural_order) if path.is_dir() else [path]:
                run = file.parent if file.name == FILE_NAME else file.with_suffix("")
                top = path if path.is_dir() else run
                names.setdefault(file, "/".join([top.resolve().name, *run.relative_to(top).parts]))
        shown = Counter(names.values())
        unique = {file: name if shown[name] == 1 else str(file.parent) for file, name in names.items()}
        return dict(zip(unique, _short_names(list(unique.values())), strict=True))


def _short_names(names: list[str]) -> list[str]:
    """Names whose last folder lists settings, without those that all runs of the folder share or that say how to
    measure; unchanged if they would no longer be unique.
    """
    parts = [_overrides(name) for name in names]
    folders: dict[str, list[set[str]]] = defaultdict(list)
    for folder, settings in parts:
        folders[folder].append(set(settings))
    short = []
    for name, (folder, settings) in zip(names, parts, strict=True):
        shared = set.intersection(*folders[folder]) if len(folders[folder]) > 1 else set()
        kept = [one for one in settings if one not in shared and not is_measurement(one.partition("=")[0])]
        short.append(f"{folder}/{','.join(kept)}" if kept else name)
    return short if len(set(short)) == len(short) else names


def _overrides(name: str) -> tuple[str, list[str]]:
    """The folder of a run's folder, and the settings that its name lists: commas within brackets belong to a value."""
    folder, _, last = name.rpartition("/")
    settings = re.split(r",(?![^\[\]]*\])", last)
    return (folder, settings) if all("=" in one for one in settings) else (name, [])


def _best_resolutions(runs: Sequence[Run]) -> list[dict[str, str]]:
    """``task`` and ``text`` for each model evaluated at several sizes of the picture, on each set of images."""
    points: dict[tuple[Any, ...], list[Point]] = {}
    for run in runs:
        result = run.result
        key = (result["backbone"], result["task"], result["dataset"], result["points"][0]["images"])
        points.setdefault(key, result["points"][:1]).extend(result["points"][1:])
    lines = {key: best_resolution(members) for key, members in points.items()}
    return [
        {"task": task, "text": f"{backbone}: {line}"}
        for (backbone, task, *_), line in lines.items()
        if line is not None
    ]


def _within_budget(runs: Sequence[Run]) -> tuple[list[list[dict[str, str]]], list[str]]:
    """The first pictures of each run within ``REPORT_PICTURE_BYTES``, and a note about the others.

    Every run gets its first picture before one gets its second, so that the same images are there for all policies.
    """
    left, left_out = REPORT_PICTURE_BYTES, 0
    kept: list[list[dict[str, str]]] = [[] for _ in runs]
    for i in range(max((len(run.pictures) for run in runs), default=0)):
        for run, fitting in zip(runs, kept, strict=True):
            if i < len(run.pictures):
                left -= len(run.pictures[i]["uri"])
                if left >= 0:
                    fitting.append(run.pictures[i])
                else:
                    left_out += 1
    total = f"together they would be larger than {REPORT_PICTURE_BYTES >> 20} MiB"
    return kept, [f"{left_out} pictures are left out: {total}."] if left_out else []


def _policies(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(point["policy"] for run in runs for point in run.result["points"]))
