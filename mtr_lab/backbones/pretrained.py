"""The configuration of a registered model in timm's terms: its weights, their classes and their preprocessing."""

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

ASSETS = resources.files("mtr_lab") / "assets"
IMAGENET = "imagenet-1k"


def complete(
    configs: Mapping[str, Mapping[str, Any]], *, first_conv: str, classifier: str
) -> dict[str, dict[str, Any]]:
    """The configuration of each architecture, from what is particular to the weights ``ARCHITECTURE.TAG``.

    The defaults are ImageNet-1k with the preprocessing of DeiT: resize to size / 0.875, centre crop. The fields are
    those of timm's ``PretrainedCfg``, and those of ``OURS``. ``label_names`` may also be the name of one of timm's
    datasets.

    Args:
        configs: by ``ARCHITECTURE.TAG``.
        first_conv, classifier: the names of these modules in the models of the family.
    """
    modules = {"first_conv": first_conv, "classifier": classifier}
    return {
        name: {"architecture": name, "tag": tag, **_DEFAULTS, **modules, **config}
        for (name, tag), config in ((key.split("."), config) for key, config in configs.items())
    }


OURS: dict[str, Any] = {"published_top1": None, "published_gflops": None, "num_frames": None, "verified": "outputs"}
"""What timm does not have: the ImageNet-1k accuracy that the authors report, a fraction, and the GFLOPs at the model's
input size; ``None``: none is known from a source of theirs. The frames of weights for videos. And what was verified
here: ``outputs`` equal those of the authors' code with random weights, or ``weights``, the file itself, were trained
and evaluated."""

_DEFAULTS = {
    "custom_load": False,
    "input_size": (3, 224, 224),
    "fixed_input_size": False,
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "num_classes": 1000,
    "label_names": IMAGENET,
    "pool_size": None,
    **OURS,
}


def timm_config(
    registered: Mapping[str, Any], given: Any = None, overlay: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The fields of timm's ``PretrainedCfg``: the registered ones, or those that timm's factory was given instead."""
    if given is None and overlay is None:
        return {key: value for key, value in registered.items() if key not in OURS}
    from timm.models import resolve_pretrained_cfg

    resolved: dict[str, Any] = resolve_pretrained_cfg(registered["architecture"], given, overlay).to_dict()
    return resolved


def label_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The class names in index order (of ImageNet, WordNet ids), ``None`` if they are unknown."""
    names = config.get("label_names")
    if isinstance(names, str):
        return _timm_label_names(names)
    return tuple(names) if names else None


@cache
def _timm_label_names(dataset: str) -> tuple[str, ...]:
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo(dataset).label_names())
