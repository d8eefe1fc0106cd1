"""A configuration runs no code but the program's parts, whatever the installed version of Hydra permits."""

from pathlib import Path

import pytest
from small_run import SMALL

from mtr_lab.__main__ import main
from mtr_lab.cli.program import compose
from mtr_lab.errors import UserError

CALL = "_target_: os.mkdir, path: ran"


OURS = (
    "a configuration may name",
    "part of a configuration",
    "logging may call",
    "expected _target_=",
    "not plain YAML",
)
"""Of the messages, one each; Hydra's own protection, which depends on its version, has others."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(run, tmp_path: Path) -> bool:
    one_line = run.err.startswith("mtr_lab: ") and "Traceback" not in run.err
    return run.code == 2 and one_line and any(ours in run.err for ours in OURS) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        [f"+hydra.callbacks.mine={{{CALL}}}"],
        ["+hydra.callbacks.mine._target_=os.mkdir", "+hydra.callbacks.mine.path=ran"],
        [f"+trainer.callbacks=[{{{CALL}}}]"],
        [f"+dataset.train_transform={{a: {{b: [{{{CALL}}}]}}}}"],
        ["dataset._target_=os.mkdir"],
        ["dataset._target_=mtr_lab.data.os.mkdir"],
        ["trainer._target_=lightning.pytorch.loggers.os.mkdir"],
        [f"logger={{mine: {{{CALL}}}}}"],
        ['+trainer.callbacks="${oc.create:{' + CALL.replace(" ", "") + '}}"'],
        ["+hydra.job_logging.filters.mine={'()': os.mkdir, path: ran}"],
    ],
)
def test_an_override_calls_nothing_else(run_program, tmp_path: Path, overrides: list[str]) -> None:
    run = run_program(main, *SMALL, *overrides)
    assert refused(run, tmp_path), run.err


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("reduction/mine.yaml", f"# @package hydra.callbacks\nmine: {{{CALL}}}\n"),
        ("hydra/callbacks/mine.yaml", f"mine: {{{CALL}}}\n"),
        ("hydra/callbacks/mine.yaml", 'mine: {"\\x5ftarget_": os.mkdir, path: ran}\n'),
        ("logger/mine.yaml", f"mine: {{{CALL}}}\n"),
        ("logger/mine.yaml", "mine: !!python/object/apply:os.mkdir [ran]\n"),
        ("logger/mine.yaml", "mine: [\n"),
    ],
)
@pytest.mark.parametrize("place", ["--config-dir", "hydra.searchpath"])
def test_a_file_of_the_user_calls_nothing_else(run_program, tmp_path: Path, file: str, text: str, place: str) -> None:
    path = tmp_path / "conf" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    chosen = f"{'+' if file.startswith('hydra') else ''}{path.parent.relative_to(tmp_path / 'conf')}=mine"
    folder = tmp_path / "conf"
    where = ["--config-dir", str(folder)] if place == "--config-dir" else [f"hydra.searchpath=[file://{folder}]"]
    run = run_program(main, *SMALL, *where, chosen)
    assert refused(run, tmp_path), run.err
    assert str(path) in run.err


def test_parts_of_the_program_may_be_chosen() -> None:
    callback = "+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.Timer}]"
    assert compose("train", [callback]).trainer.callbacks[0]._target_.endswith("Timer")
    with pytest.raises(UserError, match="mtr_lab.evaluate_model takes your model and your data"):
        compose("config", ["trainer._target_=builtins.eval"])
