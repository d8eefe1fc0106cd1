import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mtr_lab.results import environment as module
from mtr_lab.results.environment import environment


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_it_names_software_and_machine_and_is_json() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == str(torch.__version__)
    assert found["threads"] == torch.get_num_threads()
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert (found["cuda"] is None) == (not found["gpus"])


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo")
def test_the_processor_is_named() -> None:
    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    if named:
        assert environment()["cpu"] == named[0].partition(":")[2].strip()


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_the_commit_is_that_of_the_checkout_and_says_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    git(tmp_path, "tag", "-a", "v1", "-m", "a tag")
    head = git(tmp_path, "rev-parse", "HEAD")

    monkeypatch.setattr(module, "_CHECKOUT", tmp_path)
    (tmp_path / "untracked.txt").write_text("")
    assert environment()["commit"] == head
    (tmp_path / "code.py").write_text("2")
    assert environment()["commit"] == f"{head}-dirty"

    inside = tmp_path / "site-packages"
    inside.mkdir()
    monkeypatch.setattr(module, "_CHECKOUT", inside)
    assert environment()["commit"] is None


def test_missing_tools_are_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(module, "_CHECKOUT", tmp_path)
    assert environment()["commit"] is None  # not a repository
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None  # no git
