"""What is imported, and when: programs answer, and say what they will do, before PyTorch is there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from small_run import SMALL

import mtr_lab
from mtr_lab import __main__ as evaluate_program
from mtr_lab import bench as bench_program
from mtr_lab import train as train_program
from mtr_lab.cli.program import compose, exit_with_message
from mtr_lab.configuration import CONF

ROOT = Path(__file__).parent.parent


def run(command: list[str], cwd: Path, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def imported_by(code: str, cwd: Path) -> set[str]:
    """The packages that a process has imported when it has executed the code."""
    done = run([sys.executable, "-c", f"import sys\n{code}\nprint('\\n', *sys.modules)"], cwd)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


MISTYPED = """
from mtr_lab import __main__, bench, train, visualize
for program in (__main__, bench, train, visualize):
    sys.argv[1:] = ["sede=1"]
    try:
        program.main()
    except SystemExit as error:
        assert error.code == 2
    else:
        raise AssertionError("it is accepted")
"""


def test_a_mistyped_key_is_answered_without_pytorch(tmp_path: Path) -> None:
    assert not {"torch", "timm", "lightning", "numba"} & imported_by(MISTYPED, tmp_path)


LIBRARY = """
import mtr_lab
assert "torch" not in sys.modules
assert callable(mtr_lab.ops.use_backend) and mtr_lab.reduction and mtr_lab.measure and mtr_lab.backbones
from mtr_lab import compile, create_model, patch, trace, unpatch
"""


def test_the_library_imports_none_of_what_the_programs_need(tmp_path: Path) -> None:
    imported = imported_by(LIBRARY, tmp_path)
    assert "torch" in imported
    assert not {"timm", "lightning", "torchvision", "numba", "hydra", "omegaconf"} & imported


def test_the_public_names_are_those_that_dir_lists() -> None:
    assert dir(mtr_lab) == sorted(mtr_lab.__all__)
    assert all(hasattr(mtr_lab, name) for name in mtr_lab.__all__)
    with pytest.raises(AttributeError, match="'mtr_lab' has no attribute 'creat_model'"):
        mtr_lab.creat_model  # noqa: B018


def test_the_version_is_stated_without_pytorch(tmp_path: Path) -> None:
    program = "from mtr_lab.train import main; sys.argv[1:] = ['--version']; main()"
    assert not {"torch", "lightning", "timm"} & imported_by(program, tmp_path)


def test_the_first_line_says_what_will_be_done_before_pytorch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("print('PyTorch is imported')\nraise SystemExit")
    where = f"hydra.run.dir={tmp_path / 'run'}"
    done = run([sys.executable, "-m", "mtr_lab", *SMALL, "mtr.ratio=0.3", where], tmp_path, path=tmp_path)
    what = "evaluating vim_nano on imagenette_sample, unreduced and by mtr at mtr.ratio=0.3"
    assert done.stdout.splitlines() == [f"{what}; writing to {tmp_path / 'run'}", "PyTorch is imported"]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("program", "name", "overrides", "expected"),
    [
        (evaluate_program, "config", ["mtr.ratio=null"], "vim_nano on imagenette_sample, unreduced and by mtr at the"),
        (evaluate_program, "config", ["~dataset.name"], "evaluating vim_nano on None"),
        (train_program, "train", ["task=detection"], "training vim_nano for detection on bccd_sample, 100 epochs"),
        (bench_program, "bench", ["bench.ratio=0.2"], "timing vim_nano at batch 8, policies none, mtr at ratio 0.2"),
    ],
)
def test_every_program_says_what_it_does(program, name: str, overrides: list[str], expected: str) -> None:
    assert expected in program.announce(compose(name, overrides))


def test_one_process_of_several_says_it(run_program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert "evaluating" not in run_program(evaluate_program.main, "mtr.ratio=1.5").out


def test_a_mistake_that_lightning_finds_is_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, exit_with_message():
        raise MisconfigurationException("no such device")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "mtr_lab: no such device\n"


COMPLETE = """
eval "$("$1" -m mtr_lab -sc install=bash)"
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*"
_mtr_lab
echo "${COMPREPLY[@]}"
"""


def completed(cwd: Path, *words: str) -> list[str]:
    """What bash offers for the last word of ``python -m mtr_lab …``, or of ``mtr-lab …``."""
    done = run(["bash", "-c", COMPLETE, "bash", sys.executable, "-m", "mtr_lab", *words], cwd)
    return sorted(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_names(tmp_path: Path) -> None:
    expected = [f"backbone={path.stem}" for path in CONF.glob("backbone/vi*.yaml")]
    assert completed(tmp_path, "mtr.ratio=0.3", "backbone=vi") == sorted(expected)
    assert completed(tmp_path, "mtr.se") == ["mtr.seed=", "mtr.selection="]
    (tmp_path / "reduction").mkdir()
    (tmp_path / "reduction" / "mtr_of_mine.yaml").write_text("# @package mtr\ndefaults: [mtr]\n")
    assert completed(tmp_path, "--config-dir", ".", "reduction=mt") == ["reduction=mtr", "reduction=mtr_of_mine"]


def test_hydra_starts_without_a_plugin() -> None:
    """As installed without an extra."""
    code = (
        "import sys; sys.modules['hydra_plugins'] = None; sys.argv = ['mtr_lab', '--cfg', 'job'];"
        "from mtr_lab.__main__ import main; main()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "backbone:" in run.stdout
