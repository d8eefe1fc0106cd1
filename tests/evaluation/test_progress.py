"""The bar of an evaluation."""

import pytest

from mtr_lab.evaluation.progress import Phases


def test_elsewhere_than_on_a_terminal_phases_are_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    phases = Phases()
    with phases.phase("load"):
        pass
    phases.begin({"evaluate": 10, "time": 5})
    for name in ("evaluate", "time"):
        with phases.phase(name) as advance:
            advance(0.5, "mtr@0.4 · 2/4")
    assert capsys.readouterr().out == "load …\nevaluate …\ntime …\n"


def test_without_a_bar_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    phases = Phases(shown=False)
    phases.begin({"evaluate": 10})
    for name in ("load", "evaluate"):
        with phases.phase(name) as advance:
            advance(0.5, "")
    assert capsys.readouterr().out == ""


def test_a_terminal_shows_what_is_at_work_and_the_time_left_for_all_phases(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    now = iter([0.0, *[10.0] * 20])
    monkeypatch.setattr("mtr_lab.evaluation.progress.time.monotonic", lambda: next(now))
    phases = Phases()
    with phases.phase("load"):
        pass
    phases.begin({"evaluate": 10, "time": 10})
    with phases.phase("evaluate") as advance:
        advance(0.5, "mtr@0.4 · 2/4")
    out = capsys.readouterr().out
    assert "load" in out
    assert "evaluate mtr@0.4 · 2/4" in out
    assert "0:30 left" in out  # 5 of 20 parts took 10 s
