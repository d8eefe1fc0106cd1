"""Run the programs in this process, as the command line does."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

SMALL = [
    "backbone.pretrained=false",
    "backbone.depth=6",
    "backbone.embed_dim=16",
    "dataset.batch_size=4",
    "trainer.limit_test_batches=2",
    "trainer.enable_progress_bar=false",
    "timing.batch_size=0",
]
"""Overrides that make the default program finish in a second."""


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
