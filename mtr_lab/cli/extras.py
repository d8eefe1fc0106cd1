"""Optional packages: what a configuration needs besides the core is asked for before any work."""

from importlib.util import find_spec

from omegaconf import DictConfig, OmegaConf

from mtr_lab.errors import UserError


def require(package: str, extra: str, reason: str) -> None:
    """Raise a ``UserError`` with the command that installs an extra, unless its package is installed.

    Args:
        package: the module that is imported.
        extra: of mtr-lab.
        reason: what needs it, the start of the message.
    """
    if not _installed(package):
        raise UserError(f"{reason} needs an extra: pip install 'mtr-lab[{extra}]'.")


def check_extras(config: DictConfig) -> None:
    """Raise a ``UserError`` unless the packages for the logger and the source of the images are installed."""
    if "tensorboard" in (config.get("logger") or {}) and not _installed("tensorboardX"):
        require("tensorboard", "tensorboard", "logger=tensorboard")
    source = str(OmegaConf.select(config, "dataset.source"))
    for prefix, package in (("hfds/", "datasets"), ("hfids/", "datasets"), ("wds/", "webdataset")):
        if source.startswith(prefix):
            require(package, "data", f"dataset.source={source}")


def _installed(package: str) -> bool:
    """Whether a package can be imported; it is not imported, which may take seconds."""
    try:
        return find_spec(package) is not None
    except (ModuleNotFoundError, ValueError):  # hidden from the interpreter
        return False
