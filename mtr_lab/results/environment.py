"""What a result was measured with."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import NotRequired, TypedDict

_CHECKOUT = Path(__file__).resolve().parents[2]


class Environment(TypedDict):
    """Software and machine; null where it cannot be found out."""

    python: str
    torch: str
    mtr_lab: str | None
    commit: str | None  # of the checkout the package runs from, "-dirty" if tracked files differ from it
    platform: str
    cpu: str | None
    threads: int  # that PyTorch computes with
    gpus: list[str]
    device: NotRequired[str]  # that was used: cpu, or the GPU's name
    cuda: str | None


def environment() -> Environment:
    """Describe this process and machine. Never fails."""
    import torch  # here, since a report reads what others have measured with

    gpus = _gpus()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "mtr_lab": _version(),
        "commit": _commit(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
    }


def _version() -> str | None:
    try:
        return importlib.metadata.version("mtr-lab")
    except importlib.metadata.PackageNotFoundError:  # a checkout that was never installed
        return None


def _commit() -> str | None:
    # An installed copy may lie inside somebody else's repository, whose commit would say nothing.
    if not (_CHECKOUT / ".git").exists():
        return None
    # No tag matches, so what is described is the full hash.
    return _output("git", "-C", str(_CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _cpu() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or None


def _gpus() -> list[str]:
    import torch

    try:
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except RuntimeError:  # a driver that counts a GPU and cannot open it
        return []


def _output(*command: str) -> str | None:
    try:
        env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # else git writes to its index to speed up the next call
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=env)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
