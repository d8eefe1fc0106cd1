"""Run the programs in this process, as the command line does."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import mtr_lab  # noqa: F401, first of all tests, as it decides how OpenMP threads wait


@pytest.fixture
def run_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable:
    """Call a program with overrides: ``run_program(main, "mtr.ratio=0.3")`` -> exit code, stdout, stderr, folder."""

    def run(main: Callable[[], None], *overrides: str) -> SimpleNamespace:
        folder = tmp_path / "run"
        monkeypatch.setattr(sys, "argv", ["mtr_lab", f"hydra.run.dir={folder}", *overrides])
        try:
            main()
            code = 0
        except SystemExit as error:
            code = error.code
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err, folder=folder)

    return run
