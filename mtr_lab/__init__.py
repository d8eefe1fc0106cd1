"""Token reduction for Vision Mamba without retraining.

>>> model = mtr_lab.create_model("vim_s", pretrained=True)
>>> mtr_lab.patch(model, "mtr", ratio=0.4)
>>> logits = model(images)
"""

import importlib
import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from mtr_lab.errors import UserError
from mtr_lab.timm_registry import register_with_timm

# PyTorch and numba keep an OpenMP pool each. Threads that spin while they wait, which is the default, keep the other
# pool, and any other process, off the cores: on two cores with one other busy process a forward pass took 17 times as
# long. Sleeping instead costs about 10 % on an idle machine. Has no effect if torch was imported before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    __version__ = version("mtr-lab")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "UserError",
    "__version__",
    "compile",
    "create_model",
    "evaluate_model",
    "export_model",
    "list_models",
    "list_policies",
    "patch",
    "predict_images",
    "trace",
    "unpatch",
]

if TYPE_CHECKING:
    from mtr_lab import backbones as backbones
    from mtr_lab import measure as measure
    from mtr_lab import ops as ops
    from mtr_lab import reduction as reduction
    from mtr_lab.backbones import compile, create_model
    from mtr_lab.evaluation import evaluate_model
    from mtr_lab.export.model import export_model
    from mtr_lab.export.prediction import predict_images
    from mtr_lab.listing import list_models, list_policies
    from mtr_lab.reduction.patching import patch, unpatch
    from mtr_lab.reduction.tracing import trace
else:
    # PEP 562: what needs PyTorch is imported at its first use, so that programs answer --help without it.
    _HOMES = {
        "compile": "backbones",
        "create_model": "backbones",
        "evaluate_model": "evaluation",
        "export_model": "export.model",
        "list_models": "listing",
        "list_policies": "listing",
        "patch": "reduction",
        "predict_images": "export.prediction",
        "trace": "reduction",
        "unpatch": "reduction",
    }
    _SUBPACKAGES = ("backbones", "measure", "ops", "reduction")

    def __getattr__(name):
        if name in _SUBPACKAGES:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value

    def __dir__():
        return __all__


register_with_timm()
