"""``result.json``: the figures of one run at every point of the trade-off between accuracy and cost.

The types below are the schema: a result in Python is the parsed file. Shares, accuracies and intervals are fractions,
not percent. The unreduced model is the point with policy "none" and ratio 0. A number that is not finite is null.
"""

import json
import math
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, Union

from mtr_lab.errors import UserError
from mtr_lab.regular_file import read_regular
from mtr_lab.results.atomic import replace_file
from mtr_lab.results.environment import Environment
from mtr_lab.results.keys import Key
from mtr_lab.results.metrics import all_metrics
from mtr_lab.results.predictions import name_of

FILE_NAME = "result.json"
SCHEMA: Literal[2] = 2
PICTURES = "pictures"  # a folder beside it
SPEEDS = (
    "img_per_s",
    "speedup",
    "speedup_ci",
    "latency_ms",
    "peak_mib",
)  # keys of a point that were measured on a device
_KINDS = {
    float: "a number",
    int: "an integer",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
"""Types of JSON, as messages call them."""

Number = float | None
Interval = list[Number]  # [lo, hi], level 0.95


class Latency(TypedDict):
    """Percentiles of the latency of one image, ms."""

    p50: Number
    p95: Number


class Budget(TypedDict):
    """What a point was asked for instead of a ratio."""

    key: str  # speedup: times as fast as the unreduced model; max_drop: a fraction of the images
    asked: Number
    promised: Number  # predicted from times of blocks; the 95 % upper bound on calibration images
    measured: Number  # by the timing pass; on the evaluated images: those that change their class


class Point(TypedDict):
    """One model at one operating point.

    The metrics at the end are those of ``mtr_lab.results.metrics``, of which a point has those of its task. Every
    metric KEY, also one that is added there, is a Number, and ``KEY_ci`` an Interval.
    """

    policy: str
    ratio: Number  # the asked share of true FLOPs to remove; null if token counts or a budget were given instead
    budget: NotRequired[Budget]
    reduction: Number  # the achieved share
    flops_literature: Number
    flops_true: Number  # of one image, with the cost of the reduction itself
    flops_overhead: Number  # of one image: that cost alone
    flops_head: NotRequired[Number]  # of one image, true: the head of a dense task, contained in none of the above
    tokens: list[int]  # entering each block
    model: NotRequired[str]  # the unreduced model that stands for a policy, see ``mtr_lab.results.smaller_model``
    resolution: NotRequired[
        list[int]
    ]  # [height, width] of a resized picture, [frames, height, width] of a shorter video
    images: int  # over which the metrics are computed
    skipped: list[str]  # files that could not be read

    img_per_s: NotRequired[Number]
    speedup: NotRequired[Number]  # times as fast as the unreduced model, median over rounds that timed both
    speedup_ci: NotRequired[Interval]
    latency_ms: NotRequired[Latency]
    peak_mib: NotRequired[Number]

    top1: NotRequired[Number]
    top1_ci: NotRequired[Interval]
    top5: NotRequired[Number]
    top5_ci: NotRequired[Interval]
    balanced_accuracy: NotRequired[Number]
    balanced_accuracy_ci: NotRequired[Interval]
    agreement: NotRequired[Number]
    agreement_ci: NotRequired[Interval]
    kl: NotRequired[Number]
    kl_ci: NotRequired[Interval]
    miou: NotRequired[Number]
    miou_ci: NotRequired[Interval]
    miou_difference: NotRequired[Number]
    miou_difference_ci: NotRequired[Interval]
    map: NotRequired[Number]
    map_ci: NotRequired[Interval]
    ap50: NotRequired[Number]
    ap50_ci: NotRequired[Interval]


class Unreduced(TypedDict):
    """Where the unreduced model's predictions are from."""

    key: str
    reused: bool  # computed by another job of the sweep, under the same key


class Result(TypedDict):
    """One run of one task."""

    schema: Literal[2]
    task: str
    backbone: str
    dataset: str
    config: dict[str, Any]
    environment: Environment
    points: list[Point]
    weights: NotRequired[dict[str, Any]]  # source, revision (resolved to a commit), sha256
    key: NotRequired[Key]  # an evaluation with an equal key is not repeated
    unreduced: NotRequired[Unreduced]
    batch_size: NotRequired[int]  # images evaluated at once, where the device had no memory for dataset.batch_size
    logged: NotRequired[list[str]]  # names of the loggers that have received it


def write_result(result: Result, directory: str | Path) -> Path:
    """Write ``directory/result.json``, complete or not at all, and return its path.

    NumPy and PyTorch numbers become plain numbers, tuples become lists, other objects their text.
    """
    path = Path(directory) / FILE_NAME
    text = json.dumps(_plain(result), indent=2, ensure_ascii=False, allow_nan=False)
    with replace_file(path) as stream:
        stream.write(text.encode() + b"\n")
    return path


def read_result(path: str | Path) -> Result:
    """Read a result from its file or from the folder that holds it.

    Unknown keys are kept. Results of schema 1 are upgraded.

    Raises:
        UserError: there is no such file, it is not JSON, or it does not follow the schema; the message names the
            file and the first wrong field.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        result = json.loads(read_regular(path).decode("utf-8"))
        json.dumps(result, ensure_ascii=False).encode()  # half a surrogate pair could not be written again
    except OSError as error:
        raise UserError(
            f"cannot read the result {path}: {error.strerror}. Give a {FILE_NAME} or its folder."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a result: it is not valid JSON ({error}).") from error
    if isinstance(result, dict) and result.get("schema", SCHEMA) not in (1, SCHEMA):
        raise UserError(
            f"{path} has schema {result['schema']!r}, this version of mtr_lab reads schemas 1 and {SCHEMA}: "
            "read it with the version that wrote it, or run the evaluation again."
        )
    if isinstance(result, dict) and result.get("kind") == "comparison":
        raise UserError(
            f"{path} is not a result: it is a table that compares several. Give the run folders it was made from."
        )
    result = upgrade(result)
    problem = _mismatch(result, Result, "") or (
        None if result["points"] else "points is empty, expected the unreduced model at least"
    )
    problem = problem or _metric_mismatch(result["points"]) or _unnamed(result["points"])
    if problem:
        raise UserError(f"{path} is not a result: {problem}. Expected the {FILE_NAME} of an evaluation.")
    return result


def plain_files(folder: Path) -> list[Path]:
    """The files of a folder of pictures. Links are left out: a link in a run from elsewhere may lead to any file."""
    files = [] if folder.is_symlink() else folder.glob("*")
    return [path for path in files if path.is_file() and not path.is_symlink()]


def upgrade(result: Any) -> Any:
    """Bring a result of schema 1 to schema 2, where ``flops_reduction`` is called ``flops_overhead``."""
    if not isinstance(result, dict) or result.get("schema") != 1:
        return result
    upgraded = {**result, "schema": SCHEMA}
    if isinstance(result.get("points"), list):
        renamed = {"flops_reduction": "flops_overhead"}
        upgraded["points"] = [
            {renamed.get(key, key): value for key, value in point.items() if renamed.get(key) not in point}
            if isinstance(point, dict)
            else point
            for point in result["points"]
        ]
    return upgraded


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()  # a path may have bytes that are not UTF-8
    if value is None or isinstance(value, int):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)


def _metric_mismatch(points: list[dict[str, Any]]) -> str | None:
    keys = [key for metric in all_metrics() for key in metric.keys]
    kinds = dict.fromkeys(keys, Number) | dict.fromkeys((f"{key}_ci" for key in keys), Interval)
    problems = (
        _mismatch(point[key], kind, f"points[{i}].{key}")
        for i, point in enumerate(points)
        for key, kind in kinds.items()
        if key in point
    )
    return next(filter(None, problems), None) or next(
        (
            f"points[{i}].{key} is {_shown(point[key])}, expected the two ends of an interval"
            for i, point in enumerate(points)
            for key, kind in kinds.items()
            if kind is Interval and key in point and len(point[key]) != 2
        ),
        None,
    )


@cache
def _fields(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _unnamed(points: list[dict[str, Any]]) -> str | None:
    for i, point in enumerate(points):
        try:
            name_of(point)
        except (TypeError, ValueError, LookupError, OverflowError) as error:  # a budget or a size without its numbers
            return f"points[{i}] has a budget or a resolution that cannot be read ({error!r})"
    return None


def _mismatch(value: Any, kind: Any, where: str) -> str | None:
    """Describe the first place where ``value`` is not of type ``kind``; None if it is."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return None
    if origin is NotRequired:
        return _mismatch(value, arguments[0], where)
    if origin in (Union, types.UnionType):
        mismatches = [_mismatch(value, argument, where) for argument in arguments]
        return None if None in mismatches else mismatches[0]
    if origin is Literal:
        return None if value in arguments else f"{where} is {_shown(value)}, expected {_shown(arguments[0])}"
    if origin is list and isinstance(value, list):
        problems = (_mismatch(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))
        return next(filter(None, problems), None)
    if typing.is_typeddict(kind) and isinstance(value, dict):
        missing = sorted(kind.__required_keys__ - value.keys())
        if missing:
            return f"{where or 'the file'} lacks {', '.join(missing)}"
        hints = _fields(kind).items()
        prefix = f"{where}." if where else ""
        problems = (_mismatch(value[key], hint, prefix + key) for key, hint in hints if key in value)
        return next(filter(None, problems), None)
    plain = dict if typing.is_typeddict(kind) else origin or kind
    expected = (int, float) if plain is float else plain
    if isinstance(value, expected) and isinstance(value, bool) == (plain is bool):
        large = isinstance(value, int) and abs(value) >= 2**63
        return f"{where} is an integer of {len(str(value))} digits, expected at most 19" if large else None
    return f"{where or 'the file'} is {_shown(value)}, expected {_KINDS[plain]}"


def _shown(value: Any) -> str:
    """A value as it is in the file, in 40 characters at most."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:39]}…"
