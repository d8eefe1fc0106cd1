"""What a result was measured on, in words."""

from collections.abc import Mapping
from typing import Any


def hardware(environment: Mapping[str, Any]) -> str:
    """The GPU, or the CPU and its threads, that a result's environment names as its ``device``.

    Files without one were written before there was one: theirs are the GPUs of the machine, or its CPU.
    """
    device, gpus = environment.get("device"), environment["gpus"]
    if device is None and gpus:
        return ", ".join(f"{gpus.count(gpu)} × {gpu}" if gpus.count(gpu) > 1 else gpu for gpu in dict.fromkeys(gpus))
    if device not in (None, "cpu"):
        return str(device)
    threads = environment["threads"]
    return f"{environment['cpu'] or environment['platform']}, {threads} thread{'s' if threads != 1 else ''}"
