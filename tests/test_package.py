"""The wheel carries the configuration tree and the bundled assets, and runs from any directory."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from small_run import SMALL

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a virtual environment with the wheel in it; what it depends on is taken from this one."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (wheel,) = built.glob("*.whl")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder / "bin" / "python"),
        "install",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*pip, "--quiet", str(wheel)], check=True)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder / "bin"


def run(command: list[str | Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_what_the_default_run_needs(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.read("mtr_lab/conf/config.yaml") == (ROOT / "conf" / "config.yaml").read_bytes()
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
        assert archive.getinfo("mtr_lab/assets/vim_nano.safetensors").file_size < 6 * 2**20
    assert sum(name.startswith("mtr_lab/assets/imagenette_sample/n") for name in names) == 500
    assert sum(name.startswith("mtr_lab/assets/bccd_sample/JPEGImages/") for name in names) == 20
    assert "mtr_lab/py.typed" in names
    assert "Requires-Python: >=3.11" in metadata
    for minor in (11, 12, 13):
        assert f"Classifier: Programming Language :: Python :: 3.{minor}" in metadata


def test_it_runs_from_another_directory(installed: Path, tmp_path: Path) -> None:
    small = [override for override in SMALL if not override.startswith("backbone")]
    where = f"hydra.run.dir={tmp_path / 'run'}"
    done = run([installed / "python", "-m", "mtr_lab", *small, "mtr.ratio=0.3", where], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "result.json").exists()
    found = run([installed / "python", "-c", "import mtr_lab; print(mtr_lab.__file__)"], tmp_path).stdout
    assert str(installed.parent) in found


def test_both_programs_state_the_version_of_the_wheel(built: Path, installed: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    version = wheel.name.split("-")[1]
    assert re.match(r"\d+\.\d+", version)
    for program in ([installed / "mtr-lab"], [installed / "python", "-m", "mtr_lab"]):
        done = run([*program, "--version"], tmp_path)
        assert (done.returncode, done.stdout) == (0, f"mtr_lab {version}\n"), done.stderr


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_a_version_can_be_had_without_tags_and_without_git(tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "--quiet", "--no-tags", "--depth=1", ROOT.as_uri(), tmp_path / "clone"], check=True)
    command: list[str | Path] = [sys.executable, "-m", "hatchling", "version"]
    assert re.match(r"\d+\.\d+.*\+g[0-9a-f]+", run(command, tmp_path / "clone").stdout)
    shutil.rmtree(tmp_path / "clone" / ".git")
    assert run(command, tmp_path / "clone").stdout.strip() == "0.1.0"
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path / "clone", check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path / "clone", check=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *author, "commit", "--quiet", "-m", "a"], cwd=tmp_path / "clone", check=True)
    subprocess.run(["git", *author, "tag", "v3.1.4"], cwd=tmp_path / "clone", check=True)
    assert run(command, tmp_path / "clone").stdout.strip() == "3.1.4"


def test_a_mistake_ends_with_code_2_and_no_traceback(installed: Path, tmp_path: Path) -> None:
    done = run([installed / "python", "-m", "mtr_lab", "mtr.ratio=2", f"hydra.run.dir={tmp_path / 'run'}"], tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("mtr_lab: mtr.ratio must be a share")
    assert "Traceback" not in done.stderr
