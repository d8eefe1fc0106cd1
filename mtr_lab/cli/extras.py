"""What a configuration needs besides the core is asked for before any work."""

from omegaconf import DictConfig, OmegaConf

from mtr_lab.packages import installed, require


def check_extras(config: DictConfig) -> None:
    """Raise a ``UserError`` unless the packages for the logger and the source of the images are installed."""
    if "tensorboard" in (config.get("logger") or {}) and not installed("tensorboardX"):
        require("tensorboard", "tensorboard", "logger=tensorboard")
    source = str(OmegaConf.select(config, "dataset.source"))
    for prefix, package in (("hfds/", "datasets"), ("hfids/", "datasets"), ("wds/", "webdataset")):
        if source.startswith(prefix):
            require(package, "data", f"dataset.source={source}")
