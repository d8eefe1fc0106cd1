import json
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtr_lab.errors import UserError
from mtr_lab.results.metrics import all_metrics
from mtr_lab.results.schema import Interval, Number, Point, Result, read_result, write_result


def test_a_result_returns_from_its_file_and_its_folder(result: Result, tmp_path: Path) -> None:
    path = write_result(result, tmp_path / "run")
    assert path == tmp_path / "run" / "result.json"
    assert read_result(path) == read_result(path.parent) == result


def test_dense_and_untimed_points_are_results_too(result: Result, tmp_path: Path) -> None:
    for point in result["points"]:
        for key in ("top1", "top1_ci", "top5", "top5_ci", "img_per_s", "latency_ms", "peak_mib"):
            del point[key]  # type: ignore[misc]
        point["miou"] = 0.41
    result["points"][1]["ratio"] = None
    del result["weights"]
    assert read_result(write_result(result, tmp_path)) == result


def test_numbers_of_libraries_become_plain_and_infinite_ones_null(result: Result, tmp_path: Path) -> None:
    result["points"][0]["top1"] = np.float32(0.5)  # type: ignore[typeddict-item]
    result["points"][0]["tokens"] = torch.tensor([197, 83])  # type: ignore[typeddict-item]
    result["points"][0]["kl"] = float("nan")
    result["points"][0]["kl_ci"] = (0.0, np.inf)  # type: ignore[typeddict-item]
    result["config"]["root"] = tmp_path
    read = read_result(write_result(result, tmp_path))
    assert [read["points"][0][key] for key in ("top1", "tokens", "kl", "kl_ci")] == [0.5, [197, 83], None, [0.0, None]]
    assert read["config"]["root"] == str(tmp_path)


def test_keys_of_others_are_kept(result: Result, tmp_path: Path) -> None:
    path = write_result({**result, "note": "mine"}, tmp_path)  # type: ignore[typeddict-unknown-key]
    assert read_result(path)["note"] == "mine"  # type: ignore[typeddict-item]


def change(path: tuple[Any, ...], value: Any):  # type: ignore[no-untyped-def]
    def apply(result: Any) -> Any:
        inner = result
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return result

    return apply


def test_a_result_of_schema_1_is_upgraded_when_it_is_read(result: Result, tmp_path: Path) -> None:
    old: Any = json.loads(json.dumps(result))
    old["schema"] = 1
    for point in old["points"]:
        point["flops_reduction"] = point.pop("flops_overhead")
    (tmp_path / "result.json").write_text(json.dumps(old))
    assert read_result(tmp_path) == result
    assert read_result(write_result(read_result(tmp_path), tmp_path)) == result


@pytest.mark.parametrize("damage", [{"points": None}, {"points": [1]}, {"points": [{}]}])
def test_a_damaged_result_of_schema_1_is_refused(damage: dict[str, Any], result: Result, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({**result, "schema": 1, **damage}))
    with pytest.raises(UserError, match=r"result\.json is not a result: points"):
        read_result(tmp_path)


def test_a_cost_that_schema_1_has_twice_keeps_its_new_name(result: Result, tmp_path: Path) -> None:
    points = [{**point, "flops_overhead": 5.0, "flops_reduction": 123.0} for point in result["points"]]
    (tmp_path / "result.json").write_text(json.dumps({**result, "schema": 1, "points": points}))
    assert {point["flops_overhead"] for point in read_result(tmp_path)["points"]} == {5.0}


def test_nesting_without_an_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="not valid JSON"):
        read_result(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda result: [], r"the file is \[\], expected an object"),
        (lambda result: {"a": 1}, "the file lacks backbone, config"),
        (change(("points", 1), {}), r"points\[1\] lacks flops_literature, flops_overhead"),
        (change(("points",), None), "points is null, expected a list"),
        (change(("points",), []), "points is empty, expected the unreduced model"),
        (change(("backbone",), "\ud800"), "not valid JSON"),
        (change(("points", 2, "top1"), "0.8"), r'points\[2\]\.top1 is "0\.8", expected a number'),
        (change(("points", 2, "tokens"), [197, 8.5]), r"points\[2\]\.tokens\[1\] is 8\.5, expected an integer"),
        (change(("points", 0, "images"), True), r"points\[0\]\.images is true, expected an integer"),
        (change(("points", 0, "latency_ms"), {"p50": 1.0}), r"points\[0\]\.latency_ms lacks p95"),
        (change(("config",), []), r"config is \[\], expected an object"),
        (change(("schema",), 3), r"has schema 3, this version of mtr_lab reads schemas 1 and 2"),
    ],
)
def test_a_file_of_another_form_is_refused_with_its_name_and_place(
    damage: Any, message: str, result: Result, tmp_path: Path
) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps(damage(result)))
    with pytest.raises(UserError, match=rf"other\.json.*{message}"):
        read_result(path)


def test_missing_and_truncated_files_are_user_errors(result: Result, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path.name}.*result\.json.*No such file"):
        read_result(tmp_path)
    path = write_result(result, tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"result\.json is not a result: it is not valid JSON"):
        read_result(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"result\.json is not a result"):
        read_result(path)


def test_a_point_declares_every_metric_for_type_checkers() -> None:
    keys = {key for metric in all_metrics() for key in metric.keys}
    declared = typing.get_type_hints(Point)
    assert {key.removesuffix("_ci") for key in declared if key.endswith("_ci")} == keys | {"speedup"}
    assert all(declared[key] == Number and declared[f"{key}_ci"] == Interval for key in keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_ci": [0.1]}, r"points\[1\]\.kl_ci is \[0\.1\], expected the two ends"),
        ({"ratio": 10**400}, r"points\[1\]\.ratio is an integer of 401 digits, expected at most 19"),
        (
            {"budget": {"key": "speedup", "asked": None, "promised": None, "measured": None}},
            "budget or a resolution that cannot be read",
        ),
    ],
)
def test_a_point_that_no_table_could_show_is_refused(result: dict, tmp_path: Path, changes: dict, message: str) -> None:
    result["points"][1] |= changes
    (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match=message):
        read_result(tmp_path)
