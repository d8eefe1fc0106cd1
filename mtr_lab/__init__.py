"""Token reduction for Vision Mamba without retraining.

>>> model = mtr_lab.create_model("vim_s", pretrained=True)
>>> mtr_lab.patch(model, "mtr", ratio=0.4)
>>> logits = model(images)
"""

from importlib.metadata import PackageNotFoundError, version

from mtr_lab.backbones import create_model
from mtr_lab.errors import UserError
from mtr_lab.reduction import patch, trace, unpatch

try:
    __version__ = version("mtr-lab")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = ["UserError", "__version__", "create_model", "patch", "trace", "unpatch"]
