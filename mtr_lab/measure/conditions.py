"""What a measured time depends on besides the model and its input."""

import platform
from pathlib import Path
from typing import Any

import torch

import mtr_lab
from mtr_lab import ops


def conditions(device: torch.device) -> dict[str, Any]:
    """The machine, device, threads, backend, precision and versions under which times are measured now."""
    source = Path(mtr_lab.__file__).parent
    return {
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "backend": ops.selected_backend(),
        "autocast": torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None,
        "versions": [mtr_lab.__version__, torch.__version__],
        "code": max(path.stat().st_mtime_ns for path in source.rglob("*.py")),
    }
