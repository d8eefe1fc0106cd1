"""The dashboard: results as one HTML file that works without a network."""

import base64
import hashlib
import importlib.resources
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from mtr_lab.errors import UserError
from mtr_lab.report.axes import axes
from mtr_lab.results import predictions_file
from mtr_lab.results.atomic import replace_file
from mtr_lab.results.comparison import Sample, check_same_images, compare_all
from mtr_lab.results.environment import hardware_name
from mtr_lab.results.predictions import point_name
from mtr_lab.results.predictions_file import load_predictions
from mtr_lab.results.resampling import RESAMPLES
from mtr_lab.results.schema import FILE_NAME, PICTURES, Point, Result, read_result
from mtr_lab.results.seeds import Place, mean_point, seed_groups
from mtr_lab.results.settings import flatten

PICTURE_BYTES = 4 << 20
"""Larger pictures are not embedded."""
REPORT_PICTURE_BYTES = 48 << 20
"""The limit for all pictures of a report together."""

_SCRIPTS = (
    *("format", "dom", "styles", "data", "charts", "tokens", "tables"),
    *("differences", "downloads", "details", "filters", "main"),
)
"""The files of the page's script, in this order: a file's top level may use the files before it."""
_PICTURE_TYPES = {".png": "image/png", ".gif": "image/gif"}
_SPEED = ("img_per_s", "latency_ms", "peak_mib")
_SPEED_SETTINGS = ("timing.batch_size", "trainer.cuda_graph", "trainer.precision", "ops.backend")
_NAMED_SETTINGS = 4  # in the name of a variant


@dataclass(frozen=True)
class Run:
    """A run folder as it was read."""

    name: str  # unique within a report
    result: Result
    sample: Sample | None
    pictures: list[dict[str, str]]  # name and data URI
    notes: list[str]


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
        return [(name, _stamp(file)) for file, name in self._files().items()]

    def data(self) -> dict[str, Any]:
        """The data of the page.

        Returns:
            ``axes`` of the charts; ``runs`` with their unchanged results; ``points``, which are places in these
            results, or means of points that differ only in the seed; paired ``differences`` between points; ``notes``
            that say what was left out, and why.

        Raises:
            UserError: a path does not exist, or a given file or run folder is not a result. A bad file within a given
                folder becomes a note instead.
        """
        runs, notes = [], []
        for file, name in self._files().items():
            stamp = (name, _stamp(file))
            known, run = self._read.get(file, (None, None))
            if run is None or known != stamp:
                try:
                    run = _read_run(file, name)
                except UserError as error:
                    if file in self.paths or file.parent in self.paths:
                        raise
                    notes.append(str(error))
                    continue
                self._read[file] = (stamp, run)
            runs.append(run)
            notes += run.notes
        seeds = seed_groups([run.result for run in runs])
        variants = _variants(runs, seeds)
        differences, refused = _differences(runs, seeds)
        pictures, left_out = _within_budget(runs)
        return {
            "written": datetime.now().astimezone().isoformat(timespec="seconds"),
            "axes": axes(),
            "resamples": RESAMPLES,
            "runs": [
                {
                    "name": run.name,
                    "variant": variant,
                    "hardware": hardware_name(run.result["environment"]),
                    "paired": run.sample is not None,
                    "result": run.result,
                    "pictures": embedded,
                }
                for run, variant, embedded in zip(runs, variants, pictures, strict=True)
            ],
            "points": list(_points(runs, seeds)),
            "differences": differences,
            "notes": [*notes, *refused, *left_out],
        }

    def _files(self) -> dict[Path, str]:
        """Result files and the names of their runs: the folders from the given path on."""
        names: dict[Path, str] = {}
        for path in self.paths:
            if not path.exists():
                raise UserError(f"there is no {path}. Give {FILE_NAME} files, or folders that contain them.")
            for file in sorted(path.rglob(FILE_NAME), key=_natural) if path.is_dir() else [path]:
                run = file.parent if file.name == FILE_NAME else file.with_suffix("")
                top = path if path.is_dir() else run
                names.setdefault(file, "/".join([top.resolve().name, *run.relative_to(top).parts]))
        shown = list(names.values())
        return {file: name if shown.count(name) == 1 else str(file.parent) for file, name in names.items()}


def build(paths: Sequence[Path], output: Path) -> dict[str, Any]:
    """Write the report of some results to one self-contained file, and return its data.

    Args:
        paths: see ``Reader``.
        output: the HTML file; it appears complete or not at all.

    Raises:
        UserError: see ``Reader.data``; there is no result; Plotly is not installed; ``output`` cannot be written.
    """
    data = Reader(paths).data()
    if not data["runs"]:
        reason = " ".join(data["notes"]) or f"No {FILE_NAME} in {', '.join(map(str, paths))}."
        raise UserError(f"nothing to show. {reason}")
    html = page(data)
    try:
        with replace_file(output) as stream:
            stream.write(html.encode())
    except OSError as error:
        raise UserError(f"cannot write the report {output}: {error.strerror}.") from error
    return data


def page(data: dict[str, Any], *, live: bool = False) -> str:
    """The HTML of a report.

    Its content security policy allows only its two scripts, and no request but those of a live page to its server.

    Args:
        data: of ``Reader.data``.
        live: whether the page polls its server for newer data.

    Raises:
        UserError: Plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError("the report's charts need Plotly: pip install 'mtr-lab[report]'.") from error
    files = importlib.resources.files("mtr_lab.report.dashboard")
    template, style, *parts = (
        (files / name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", *(f"{name}.js" for name in _SCRIPTS))
    )
    script = "\n".join(['"use strict";', "(() => {", *parts, "})();", ""])  # one scope, apart from Plotly's
    # Browsers hash the text with line feeds, up to the end tag, which must not occur in it.
    scripts = [text.replace("\r\n", "\n").replace("</script", r"<\/script") for text in (get_plotlyjs(), script)]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    sources = {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
        "connect-src": "'self'" if live else "'none'",
        "script-src": " ".join(f"'sha256-{digest}'" for digest in hashes),
    }
    values = {
        "live": str(live).lower(),
        "policy": "; ".join(f"{name} {value}" for name, value in sources.items()),
        "style": style,
        "data": to_json(data).replace("<", r"\u003c"),  # or a "</script>" in a text would end the block
        "plotly": scripts[0],
        "script": scripts[1],
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def to_json(data: dict[str, Any]) -> str:
    """JSON as browsers read it: numbers that are not finite, from hand-written results, are null."""
    return json.dumps(json.loads(json.dumps(data), parse_constant=lambda name: None), ensure_ascii=False)


def _read_run(file: Path, name: str) -> Run:
    result, notes, sample = read_result(file), [], None
    names = [point_name(point["policy"], point["ratio"]) for point in result["points"]]
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


def _pictures(file: Path) -> list[Path]:
    files = (file.parent / PICTURES).glob("*")
    return sorted((path for path in files if path.suffix in _PICTURE_TYPES and path.is_file()), key=_natural)


def _stamp(file: Path) -> list[tuple[str, int, int]]:
    files = [path for path in (file, file.parent / predictions_file.FILE_NAME, *_pictures(file)) if path.exists()]
    return [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files]


def _natural(path: Path) -> list[str | int]:
    """A sort key that orders numbers in names by value, 9 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def _within_budget(runs: Sequence[Run]) -> tuple[list[list[dict[str, str]]], list[str]]:
    """The first pictures of the runs within ``REPORT_PICTURE_BYTES``, and notes about the others."""
    left, kept, notes = REPORT_PICTURE_BYTES, [], []
    for run in runs:
        fitting = []
        for picture in run.pictures:
            left -= len(picture["uri"])
            if left >= 0:
                fitting.append(picture)
        if len(fitting) < len(run.pictures):
            total = f"all pictures together would be larger than {REPORT_PICTURE_BYTES >> 20} MiB"
            notes.append(f"{run.name}: {len(run.pictures) - len(fitting)} pictures are left out, {total}.")
        kept.append(fitting)
    return kept, notes


def _setting(run: Run) -> tuple[str, ...]:
    """What two runs must share for their points to be compared."""
    return run.result["task"], run.result["backbone"], run.result["dataset"]


def _points(runs: Sequence[Run], seeds: Sequence[Sequence[Place]]) -> Iterator[dict[str, Any]]:
    """The points to show, each as a run and an index in its result; ``places`` are all points that it stands for.

    A sweep evaluates the unreduced model in each run, with equal figures except the speed. It is shown once, as in the
    run with the median speed; runs with other timing settings count apart. A group of ``seeds``, whose points differ
    only in the seed, is shown as its ``mean``, at the place of its first point.
    """
    equal: dict[str, list[Place]] = defaultdict(list)
    grouped = {place for group in seeds for place in group}
    for r, run in enumerate(runs):
        for i, point in enumerate(run.result["points"]):
            if (r, i) in grouped:
                continue
            key: list[Any] = [r, i]
            if point["policy"] == "none":
                content = {name: value for name, value in point.items() if name not in _SPEED}
                key = [_setting(run), hardware_name(run.result["environment"]), run.result.get("weights"), content]
                if any(name in point for name in _SPEED):
                    settings = dict(flatten(run.result["config"]))
                    key.append([settings.get(name) for name in _SPEED_SETTINGS])
            equal[json.dumps(key, sort_keys=True)].append((r, i))
    for places in equal.values():
        by_speed = sorted(places, key=lambda place: runs[place[0]].result["points"][place[1]].get("img_per_s") or 0)
        r, i = by_speed[(len(places) - 1) // 2]
        yield {"run": r, "point": i, "places": places}
    results = [run.result for run in runs]
    for group in seeds:
        r, i = group[0]
        yield {"run": r, "point": i, "places": group, "mean": mean_point(results, group)}


def _variants(runs: Sequence[Run], seeds: Sequence[Sequence[Place]]) -> list[str]:
    """What tells runs of the same policy apart: number of images and settings that differ, else the name, else ""."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for r, run in enumerate(runs):
        policies = frozenset(point["policy"] for point in run.result["points"]) - {"none"}
        groups[_setting(run), hardware_name(run.result["environment"]), policies].append(r)
    variants = [""] * len(runs)
    others = {place for group in seeds for place in group[1:]}  # shown as one point with the first of their group
    for members in groups.values():
        settings = {r: {"images": _images(runs[r]), **dict(flatten(runs[r].result["config"]))} for r in members}
        keys = dict.fromkeys(key for flat in settings.values() for key in flat)
        varied = [key for key in keys if len({flat.get(key) for flat in settings.values()}) > 1]
        for r in members:
            named = [f"{key}={settings[r].get(key)}" for key in varied[:_NAMED_SETTINGS]]
            variants[r] = ", ".join(named + ["…"] * (len(varied) > _NAMED_SETTINGS))
        alike: dict[tuple[str, str], list[int]] = defaultdict(list)
        for r in members:
            for i, point in enumerate(runs[r].result["points"]):
                if point["policy"] != "none" and (r, i) not in others:
                    alike[variants[r], point_name(point["policy"], point["ratio"])].append(r)
        for r in {r for same in alike.values() if len(same) > 1 for r in same}:
            variants[r] = f"{variants[r]} ({runs[r].name})".lstrip()
    return variants


def _images(run: Run) -> str:
    """The number of images of a run, with those that could not be read."""
    point = run.result["points"][0]
    return str(point["images"] + len(point["skipped"]))


def _differences(runs: Sequence[Run], seeds: Sequence[Sequence[Place]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Compare each point with its run's unreduced point, and with all points of other policies or runs at its ratio.

    Points that differ only in the seed are compared as their mean, at the place of the first.

    Returns:
        The differences of all points that can be paired, and notes why others cannot.
    """
    sets: dict[tuple[str, ...], list[list[tuple[int, Sample]]]] = defaultdict(list)
    notes = []
    for r, run in enumerate(runs):
        if run.sample is None:
            continue
        alternatives = sets[_setting(run)]
        for members in alternatives:
            try:
                check_same_images(members[0][1].hashes, run.sample.hashes, f"{runs[members[0][0]].name} and {run.name}")
            except UserError as error:
                reason = str(error)
            else:
                members.append((r, run.sample))
                break
        else:
            if alternatives:
                notes.append(reason)
            alternatives.append([(r, run.sample)])
    differences = []
    grouped = {place for group in seeds for place in group}
    for members in (members for alternatives in sets.values() for members in alternatives):
        samples = dict(members)
        single = [[(r, i)] for r, sample in members for i in range(len(sample.points)) if (r, i) not in grouped]
        groups = [*single, *(group for group in seeds if all(r in samples for r, _ in group))]
        places = [group[0] for group in groups]
        points: list[Point] = [runs[r].result["points"][i] for r, i in places]
        pairs = [
            (a, b)
            for a, b in combinations(range(len(places)), 2)
            if points[b]["policy"] != "none" and (places[a] == (places[b][0], 0) or _same_ratio(points[a], points[b]))
        ]
        metrics = [_summed([samples[r].metrics[i] for r, i in group]) for group in groups]
        compared = compare_all(metrics, pairs, runs=[len(group) for group in groups])
        for (a, b), difference in zip(pairs, compared, strict=True):
            differences.append({"first": places[a], "second": places[b], **difference})
    return differences, notes


def _summed(metrics: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The metrics of each image, summed over runs."""
    return {name: np.sum([of_run[name] for of_run in metrics], axis=0) for name in metrics[0]}


def _same_ratio(first: Point, second: Point) -> bool:
    return first["policy"] != "none" and first["ratio"] is not None and first["ratio"] == second["ratio"]
