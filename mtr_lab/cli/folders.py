"""The folders of a sweep and of its jobs, which the configuration names.

``${job_folder:…}`` is the name of a job's folder, and ``${sweep:}`` the sweep's folder, null in a single run.
"""

import hashlib
import re
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf


def job_folder(overrides: str) -> str:
    """The name of a job's folder: its overrides, shortened and hashed where a file system would refuse them."""
    name = re.sub(r"[^\w.,=+\-\[\]]", "_", overrides)
    if name == overrides and 0 < len(name) <= 200:
        return name
    return f"{name[:180]}-{hashlib.blake2b(overrides.encode(), digest_size=4).hexdigest()}"


def sweep_folder() -> Path | None:
    """The absolute folder of the sweep that this process runs a job of, ``None`` in a single run."""
    config = HydraConfig.get()
    return Path(config.runtime.cwd, str(config.sweep.dir)) if config.mode == RunMode.MULTIRUN else None


def _sweep() -> str | None:
    """``hydra.sweep.dir`` of a sweep."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return str(HydraConfig.get().sweep.dir)


OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
OmegaConf.register_new_resolver("sweep", _sweep, replace=True)
