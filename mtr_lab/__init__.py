"""Token reduction for Vision Mamba without retraining.

>>> model = mtr_lab.create_model("vim_s", pretrained=True)
>>> mtr_lab.patch(model, "mtr", ratio=0.4)
>>> logits = model(images)
"""

import os
from importlib.metadata import PackageNotFoundError, version

# PyTorch and numba keep an OpenMP pool each. Threads that spin while they wait, which is the default, keep the other
# pool, and any other process, off the cores: on two cores with one other busy process a forward pass took 17 times as
# long. Sleeping instead costs about 10 % on an idle machine. Has no effect if torch was imported before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from mtr_lab.backbones import compile, create_model
from mtr_lab.errors import UserError
from mtr_lab.reduction import patch, trace, unpatch
from mtr_lab.timm_registry import register_with_timm

try:
    __version__ = version("mtr-lab")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

register_with_timm()

__all__ = ["UserError", "__version__", "compile", "create_model", "patch", "trace", "unpatch"]
