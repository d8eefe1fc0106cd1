"""The initialisation of Vim and VideoMamba, as in their authors' code."""

import math

import torch
from torch import nn


def initialise(model: nn.Module, depth: int) -> None:
    """Initialise all parameters but those of the scans; the weights of output projections shrink with the depth."""
    for name, parameter in model.named_parameters():
        if name.endswith("out_proj.weight"):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            with torch.no_grad():
                parameter.div_(math.sqrt(depth))
        elif name in ("pos_embed", "cls_token", "head.weight"):
            nn.init.trunc_normal_(parameter, std=0.02)
        elif name == "head.bias":
            nn.init.zeros_(parameter)
