"""Register the models with timm as soon as timm is imported, without importing it."""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODULE = "timm.models"  # timm can register models once this module is imported


def register_with_timm() -> None:
    """Register the models with timm: at once if timm is imported, else right after its import."""
    if _MODULE in sys.modules:
        _register()
    else:
        _stop_watching()  # of another copy of this module, after a reload
        sys.meta_path.insert(0, _watch)


def _register() -> None:
    from timm.models import generate_default_cfgs, is_model, model_entrypoint, register_model

    from mtr_lab.backbones import FAMILIES
    from mtr_lab.backbones.pretrained import label_names, timm_config

    for family in FAMILIES:
        configs: dict[str, Any] = {
            f"{name}.{config['tag']}": {**timm_config(config), "label_names": label_names(config)}
            for name, config in family.CONFIGS.items()
        }
        # timm reads the configurations of an entry point from this variable of its module.
        setattr(family, "default_cfgs", generate_default_cfgs(configs))  # noqa: B010
        for name in family.CONFIGS:
            entrypoint = getattr(family, name)
            if not is_model(name) or model_entrypoint(name) is not entrypoint:
                register_model(entrypoint)


class _Watch(MetaPathFinder):
    """Finds ``timm.models`` through the other finders, and makes its loader register our models, too."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """Loads ``timm.models`` with its own loader, then registers our models; the watch goes on if that fails."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()
        _stop_watching()


def _stop_watching() -> None:
    name = f"{__name__}.{_Watch.__qualname__}"
    kinds = ((finder, type(finder)) for finder in sys.meta_path)
    sys.meta_path[:] = [finder for finder, kind in kinds if f"{kind.__module__}.{kind.__qualname__}" != name]


_watch = _Watch()
