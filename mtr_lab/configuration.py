"""Where the configuration tree is, inside an installed package or at the top of a checkout, and what its files call.

``${point_folder:…}`` names the folder of a sweep's point, ``${sweep:}`` is the sweep's folder, null in a single run.
"""

import hashlib
import re
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

_PACKAGE = Path(__file__).resolve().parent

CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"


def point_folder(overrides: str) -> str:
    """Name a point by its overrides; where a file system would refuse that, shorten it and add a hash."""
    name = re.sub(r"[^\w.,=+\-\[\]]", "_", overrides)
    if name == overrides and 0 < len(name) <= 200:
        return name
    return f"{name[:180]}-{hashlib.blake2b(overrides.encode(), digest_size=4).hexdigest()}"


def sweep() -> str | None:
    """The folder of the sweep this run is a point of, as ``hydra.sweep.dir`` gives it."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return str(HydraConfig.get().sweep.dir)


OmegaConf.register_new_resolver("point_folder", point_folder, replace=True)
OmegaConf.register_new_resolver("sweep", sweep, replace=True)
