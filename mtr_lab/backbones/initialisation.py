"""The initialisation of each family, as in its authors' code."""

import math

import torch
from torch import nn

MIXER_LAYERS = ("in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj")
"""The linear layers of a mixer of two directions."""


def initialise_vim(model: nn.Module, depth: int) -> None:
    """Forward scans keep the initialisation of Mamba, Δ in [0.001, 0.1]; the bias of Δ in backward scans is zero.

    Mamba-Reg is initialised in the same way.
    """
    for name, parameter in model.named_parameters():
        if name.startswith("patch_embed.proj."):
            nn.init.zeros_(parameter) if name.endswith("bias") else _lecun_normal(parameter)
        elif name in ("pos_embed", "pos_embed_cls", "cls_token", "neck.weight", "head.weight"):
            nn.init.trunc_normal_(parameter, std=0.02)
        elif name == "head.bias" or name.endswith("dt_proj_b.bias"):
            nn.init.zeros_(parameter)
    _scale_output_projections(model, depth)


def initialise_videomamba(model: nn.Module, depth: int, long_memory: bool = False) -> None:
    """All linear layers get small weights and a bias of zero, also those of Δ, which is then about 0.69.

    With ``long_memory`` mixers keep the initialisation of Mamba, Δ in [0.001, 0.1].
    """
    _small_linear_layers(model, MIXER_LAYERS if long_memory else ())
    nn.init.trunc_normal_(model.get_parameter("pos_embed"), std=0.02)
    _scale_output_projections(model, depth)


def initialise_vmamba(model: nn.Module) -> None:
    """Linear layers get small weights; scans keep the initialisation of Mamba, Δ in [0.001, 0.1] on all paths."""
    _small_linear_layers(model)


def initialise_mambavision(model: nn.Module) -> None:
    """All linear layers get small weights and a bias of zero, also those of Δ, which is then about 0.69."""
    _small_linear_layers(model)


def initialise_plainmamba(model: nn.Module) -> None:
    """All linear layers get small weights and a bias of zero, also that of Δ, which is then about 0.69."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if name == "head.fc" and isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
    for name, parameter in model.named_parameters():
        if name == "pos_embed" or name.endswith("direction_Bs"):
            nn.init.trunc_normal_(parameter, std=0.02)


def timescale_projection(dt_rank: int, d_inner: int) -> nn.Linear:
    """Low rank -> Δ before softplus; the initial bias makes Δ log-uniform in [0.001, 0.1] after softplus."""
    projection = nn.Linear(dt_rank, d_inner)
    nn.init.uniform_(projection.weight, -(dt_rank**-0.5), dt_rank**-0.5)
    delta = torch.exp(torch.empty(d_inner).uniform_(math.log(0.001), math.log(0.1))).clamp(min=1e-4)
    with torch.no_grad():
        projection.bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # inverse of softplus
    return projection


def _small_linear_layers(model: nn.Module, excepted: tuple[str, ...] = ()) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in excepted:
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _lecun_normal(weight: nn.Parameter) -> None:
    """A variance of 1 / inputs, from a normal distribution that is cut off at two standard deviations."""
    std = weight[0].numel() ** -0.5 / 0.87962566103423978  # the standard deviation that the cut leaves of 1
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def _scale_output_projections(model: nn.Module, depth: int) -> None:
    """The variance of the residual stream then does not grow with the depth."""
    for name, parameter in model.named_parameters():
        if name.endswith("out_proj.weight"):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            with torch.no_grad():
                parameter.div_(math.sqrt(depth))
