"""The software and hardware a result was measured with."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

_CHECKOUT = Path(__file__).resolve().parents[2]


class Environment(TypedDict):
    """Versions and hardware; null where a value is unknown."""

    python: str
    torch: str
    mtr_lab: str | None
    commit: str | None  # of the checkout the package runs from; ends in "-dirty" if tracked files were changed
    platform: str
    cpu: str | None
    threads: int  # of PyTorch
    gpus: list[str]
    device: NotRequired[str]  # the device used: "cpu", or the GPU's name
    cuda: str | None


def describe_environment() -> Environment:
    """Describe this process and machine. Never fails."""
    import torch  # here: reports read environments and do without PyTorch

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


def hardware_name(environment: Mapping[str, Any]) -> str:
    """Name the hardware a result was measured on: the GPU, or the CPU and its threads.

    ``device`` says which of the two was used. Older results lack it: for these, all GPUs of the machine, else its CPU.
    """
    device, gpus = environment.get("device"), environment["gpus"]
    if device is None and gpus:
        return ", ".join(f"{gpus.count(gpu)} × {gpu}" if gpus.count(gpu) > 1 else gpu for gpu in dict.fromkeys(gpus))
    if device not in (None, "cpu"):
        return str(device)
    threads = environment["threads"]
    return f"{environment['cpu'] or environment['platform']}, {threads} thread{'s' if threads != 1 else ''}"


def _version() -> str | None:
    try:
        return importlib.metadata.version("mtr-lab")
    except importlib.metadata.PackageNotFoundError:  # a checkout that was never installed
        return None


def _commit() -> str | None:
    # A copy in site-packages may lie within another project's repository, whose commit says nothing about this code.
    if not (_CHECKOUT / ".git").exists():
        return None
    # --exclude=* ignores all tags, so that git prints the full hash.
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
        env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # or git would write to the index
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=env)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
