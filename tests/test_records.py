"""The records in ``experiments/results``: a file that states the schema of results can be read as one."""

import json
import runpy
from pathlib import Path

import pytest
from example_runs import write_sweep

from mtr_lab.errors import UserError
from mtr_lab.report.__main__ import main
from mtr_lab.results.schema import read_result

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
RECORDS = sorted((EXPERIMENTS / "results").rglob("*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_a_record_of_points_with_a_schema_is_a_result(path: Path) -> None:
    record = json.loads(path.read_text())
    if "points" in record and "schema" in record:
        read_result(path)


@pytest.mark.parametrize(
    "path", [path for path in RECORDS if path.stem.endswith("_policies")], ids=lambda path: path.name
)
def test_the_report_refuses_a_comparison(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(path), "-o", str(tmp_path / "report.html")])
    assert stopped.value.code == 2
    assert "a table that compares several. Give the run folders" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["compare_policies.py", "dense_tradeoff.py"])
def test_a_script_that_compares_runs_does_not_claim_to_write_a_result(script: str, tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep")
    out = tmp_path / "out.json"
    runpy.run_path(str(EXPERIMENTS / script))["main"](tmp_path / "sweep", out)
    record = json.loads(out.read_text())
    assert len(record["points"]) == 7
    assert "schema" not in record
    with pytest.raises(UserError, match="a table that compares several"):
        read_result(out)
