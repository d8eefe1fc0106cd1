import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from example_runs import ENVIRONMENT
from rich.console import Console

from mtr_lab.report.bench_table import bench_table
from mtr_lab.results import environment as module
from mtr_lab.results.environment import describe_environment, hardware_name


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_it_names_software_and_machine_and_is_json() -> None:
    found = describe_environment()
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == str(torch.__version__)
    assert found["threads"] == torch.get_num_threads()
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert (found["cuda"] is None) == (not found["gpus"])


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo")
def test_the_processor_is_named() -> None:
    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    if named:
        assert describe_environment()["cpu"] == named[0].partition(":")[2].strip()


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
    assert describe_environment()["commit"] == head
    (tmp_path / "code.py").write_text("2")
    assert describe_environment()["commit"] == f"{head}-dirty"

    inside = tmp_path / "site-packages"
    inside.mkdir()
    monkeypatch.setattr(module, "_CHECKOUT", inside)
    assert describe_environment()["commit"] is None


def test_missing_tools_are_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(module, "_CHECKOUT", tmp_path)
    assert describe_environment()["commit"] is None  # not a repository
    monkeypatch.setenv("PATH", "")
    assert describe_environment()["commit"] is None  # no git


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({"device": "cpu", "gpus": ["A GPU"]}, "A CPU, 2 threads"),
        ({"device": "A GPU", "gpus": ["A GPU", "Another GPU"]}, "A GPU"),
        ({"device": "cpu", "cpu": None, "threads": 1}, "Linux, 1 thread"),
        ({"gpus": ["A GPU", "Another GPU", "A GPU"]}, "2 × A GPU, Another GPU"),
        ({}, "A CPU, 2 threads"),
    ],
)
def test_the_device_that_was_used_is_named(fields: dict[str, Any], label: str) -> None:
    environment = {**ENVIRONMENT, **fields}
    assert hardware_name(environment) == label
    stream = io.StringIO()
    result = {"environment": environment, "peaks": {}, "notes": [], "rows": []}
    Console(file=stream, width=120).print(bench_table(result))
    assert stream.getvalue().strip().startswith(f"{label} · torch 2.9.0")
