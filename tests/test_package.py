"""The wheel carries the configuration tree and the bundled assets, and runs from any directory."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from small_run import SMALL

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds what installing the wheel puts on the path."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_what_the_default_run_needs(installed: Path) -> None:
    package = installed / "mtr_lab"
    assert (package / "conf" / "config.yaml").read_text() == (ROOT / "conf" / "config.yaml").read_text()
    assert len(list((package / "assets" / "imagenette_sample").rglob("*.JPEG"))) == 500
    assert len(list((package / "assets" / "bccd_sample" / "JPEGImages").glob("*.jpg"))) == 20
    assert (package / "assets" / "vim_nano.safetensors").stat().st_size < 6 * 2**20
    assert (package / "py.typed").exists()


def test_it_runs_from_another_directory(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    small = [override for override in SMALL if not override.startswith("backbone")]
    command = [sys.executable, "-m", "mtr_lab", *small, "mtr.ratio=0.3", f"hydra.run.dir={tmp_path / 'run'}"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run" / "result.json").exists()
    where = [sys.executable, "-c", "import mtr_lab; print(mtr_lab.__file__)"]
    assert str(installed) in subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout


def test_a_mistake_ends_with_code_2_and_no_traceback(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "mtr_lab", "mtr.ratio=2", f"hydra.run.dir={tmp_path / 'run'}"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("mtr_lab: mtr.ratio must be a share")
    assert "Traceback" not in run.stderr
