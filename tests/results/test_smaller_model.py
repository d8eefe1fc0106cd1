"""A smaller model in the figures of a larger one."""

from pathlib import Path

import numpy as np
import pytest
from example_runs import write_run
from rich.console import Console

from mtr_lab.report.dashboard.reader import Reader
from mtr_lab.report.dashboard.runs import read_run, smaller_models
from mtr_lab.report.table import sweep_tables
from mtr_lab.results.comparison import compare
from mtr_lab.results.predictions_file import load_predictions, save_predictions
from mtr_lab.results.schema import read_result, write_result
from mtr_lab.results.smaller_model import beside


def write_smaller(folder: Path, **changes: int) -> None:
    """A run of another backbone, of half the FLOPs and other outputs, on the same images."""
    result = write_run(folder, "mtr", backbone="vim_ti", **changes)
    for point in result["points"]:
        point["flops_true"] /= 2
    write_result(result, folder)
    predictions = load_predictions(folder)
    predictions.log_probs[0, :50] = predictions.log_probs[0, :50, ::-1]
    predictions.top5[0, :50, 0] = 5 - predictions.top5[0, :50, 0]
    save_predictions(predictions, folder)


def test_it_is_measured_against_the_larger_model(tmp_path: Path) -> None:
    write_run(tmp_path / "large", "mtr")
    write_smaller(tmp_path / "small")
    large, small = (load_predictions(tmp_path / name) for name in ("large", "small"))
    results = [read_result(tmp_path / name) for name in ("large", "small")]
    result, predictions = beside(results[0], large, results[1], small)
    unreduced, point = result["points"]
    assert unreduced == results[0]["points"][0]
    assert (point["policy"], point["model"], point["ratio"]) == ("vim_ti", "vim_ti", None)
    assert point["reduction"] == pytest.approx(0.5)
    assert point["top1"] == pytest.approx(np.mean(small.top5[0, :, 0] == small.labels))
    assert point["agreement"] == pytest.approx(np.mean(small.top5[0, :, 0] == large.top5[0, :, 0]))
    p, q = large.log_probs[0].astype(float), small.log_probs[0].astype(float)
    assert point["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), abs=1e-4)
    assert compare(large, 0, predictions, 1)["top1"]["difference"] == pytest.approx(point["top1"] - unreduced["top1"])


def test_a_report_has_it_beside_every_larger_model_on_the_same_images(tmp_path: Path) -> None:
    write_run(tmp_path / "large", "mtr")
    write_run(tmp_path / "again", "hsa")
    write_run(tmp_path / "others", "mtr", first_image=300)
    write_smaller(tmp_path / "small")
    data = Reader([tmp_path]).data()
    (line,) = [run for run in data["runs"] if run["result"]["points"][-1]["policy"] == "vim_ti"]
    assert line["result"]["backbone"] == "vim_nano"
    place = [data["runs"].index(line), 1]
    pairs = [
        difference
        for difference in data["differences"]
        if place in map(list, (difference["first"], difference["second"]))
    ]
    policies = {
        (data["runs"][r]["result"]["points"][i]["policy"], data["runs"][r]["result"]["points"][i]["ratio"])
        for difference in pairs
        for r, i in (difference["first"], difference["second"])
    }
    assert policies == {("none", 0), ("vim_ti", None), ("mtr", 0.2), ("mtr", 0.4), ("hsa", 0.2), ("hsa", 0.4)}
    assert all(0 <= difference["kl"]["p"] <= difference["kl"]["p_holm"] <= 1 for difference in data["differences"])


def test_a_sweep_ends_with_one_table_of_all_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "large", "mtr")
    write_run(tmp_path / "again", "hsa")
    write_smaller(tmp_path / "small")
    runs = [read_run(tmp_path / name / "result.json", name) for name in ("large", "again", "small")]
    results = [run.result for run in [*runs, *smaller_models(runs)]]
    (table,) = sweep_tables(results)
    Console(width=120).print(table)
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line[:1].isalpha()]
    assert ["unreduced", "0.0"] in rows
    assert [row[0] for row in rows if row[0] in ("mtr", "hsa", "vim_ti")] == ["hsa", "mtr", "hsa", "mtr", "vim_ti"]
    assert sweep_tables(results[:1]) == []
    assert sweep_tables([results[0], results[0]]) == []  # a setting other than the policy varies
