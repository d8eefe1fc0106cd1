"""Building a W&B report, against a server in this process."""

import copy
import sys
from pathlib import Path

import pytest
from wandb_server import WandbServer

from mtr_lab.errors import UserError
from mtr_lab.report.__main__ import main
from mtr_lab.report.wandb_report import build
from mtr_lab.results.schema import Result, write_result

pytest.importorskip("wandb_workspaces")


def test_a_report_has_the_table_and_the_curves(result: Result, wandb_server: WandbServer) -> None:
    address = build([result, result], "lab", entity="me")
    assert "lab" in address
    (saved,) = wandb_server.asked("upsertView")
    assert (saved["entityName"], saved["projectName"]) == ("me", "lab")
    assert saved["displayName"] == "vim_s on imagenet"
    assert saved["spec"].count("| vim_s | imagenet | mtr@0.4 | 40.2 % | 78.9 % | 90.0 % | 0.149 |") == 1
    assert '"mtr/top1"' in saved["spec"]
    assert '"mtr/kl"' in saved["spec"]


def test_runs_of_several_seeds_are_one_row(result: Result, wandb_server: WandbServer) -> None:
    runs = [copy.deepcopy(result) for _ in range(3)]
    for seed, run in enumerate(runs):
        run["config"] = {"mtr": {"seed": seed}}
        run["points"][2]["kl"] = 0.1 + 0.02 * seed
    build(runs, "lab", entity="me")
    (saved,) = wandb_server.asked("upsertView")
    assert saved["spec"].count("| mtr@0.4, mean of 3 seeds | 40.2 % | 78.9 % | 90.0 % | 0.120 |") == 1
    assert saved["spec"].count("| mtr@0.4") == 1
    assert saved["spec"].count("| none@0 |") == 1


def test_a_refusal_is_the_users_to_know(result: Result, wandb_server: WandbServer) -> None:
    wandb_server.refuse = True
    with pytest.raises(UserError, match="W&B rejected the report for project 'lab'.*permission denied"):
        build([result], "lab", entity="me")


def test_no_login(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UserError, match="log in"):
        build([result], "lab")


def test_no_package(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(UserError, match=r"mtr-lab\[workspaces\]"):
        build([result], "lab")


def test_no_result() -> None:
    with pytest.raises(UserError, match="no result to report"):
        build([], "lab")


def test_the_command_line_names_the_project(
    result: Result, wandb_server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_result(result, tmp_path / "run")
    main([str(tmp_path), "wandb=team/lab"])
    assert capsys.readouterr().out.startswith("made http")
    (saved,) = wandb_server.asked("upsertView")
    assert (saved["entityName"], saved["projectName"]) == ("team", "lab")
    with pytest.raises(SystemExit, match="2"):
        main(["wandb=lab"])
    assert "give results" in capsys.readouterr().err
