"""What a registered name stands for, in timm's terms: where its weights are and which images they were trained on."""

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

ASSETS = resources.files("mtr_lab") / "assets"
IMAGENET = "imagenet-1k"


def complete(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Complete what is particular to the weights ``ARCHITECTURE.TAG`` to a configuration of each architecture.

    The rest is that of ImageNet-1k, with images prepared as for DeiT: resize to size / 0.875, centre crop. The fields
    are those of timm's ``PretrainedCfg``, but that ``label_names`` may also name one of timm's datasets.
    """
    return {key.split(".")[0]: {**_defaults(*key.split(".")), **config} for key, config in configs.items()}


def _defaults(architecture: str, tag: str) -> dict[str, Any]:
    return {
        "architecture": architecture,
        "tag": tag,
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
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def resolve(registered: Mapping[str, Any], given: Any = None, overlay: dict[str, Any] | None = None) -> dict[str, Any]:
    """The configuration in force: the registered one unless timm's factory was given another, or changes to it."""
    if given is None and overlay is None:
        return dict(registered)
    from timm.models import resolve_pretrained_cfg

    resolved: dict[str, Any] = resolve_pretrained_cfg(registered["architecture"], given, overlay).to_dict()
    return resolved


def label_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names of the classes in index order (WordNet ids, of ImageNet), ``None`` if they are unknown."""
    names = config.get("label_names")
    if isinstance(names, str):
        return _timm_label_names(names)
    return tuple(names) if names else None


@cache
def _timm_label_names(dataset: str) -> tuple[str, ...]:
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo(dataset).label_names())
