"""Decide whether the parameters of a module may be used directly, without calling the module."""

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mtr_lab import ops

Built = TypeVar("Built", bound=nn.Module)
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def as_built(module: Built) -> Built:
    """Mark the module as built by its owner, who may use its parameters directly; a replacement lacks the mark."""
    module.as_built = True  # type: ignore[assignment]
    return module


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks other than global ones."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of the module runs the ``forward`` of its class and no hooks but global ones."""
    return not has_hooks(module) and "forward" not in module.__dict__


def is_plain(module: nn.Module) -> bool:
    """Whether the class and the parameters of the module fully determine the result of a call.

    False for a replaced module (an adapter, a quantised layer), for one with hooks or another ``forward``, and for one
    whose weight is quantised or distributed: these have to be called.
    """
    return (
        type(module) in KINDS
        and "as_built" in module.__dict__
        and is_untouched(module)
        and (
            type(module._parameters.get("weight")) is nn.Parameter  # the usual case, without a look-up by nn.Module
            or not is_traceable_wrapper_subclass(module.weight)
        )
    )


def project(module: nn.Module, x: Tensor) -> Tensor:
    """The result of a linear layer, by the fastest product where its parameters may be used directly."""
    return ops.linear(x, module.weight, module.bias) if is_plain(module) else module(x)  # type: ignore[arg-type]


def convolve_silu(conv: nn.Conv2d, maps: Tensor) -> Tensor:
    """SiLU of a depthwise convolution, by the fastest kernel where its parameters may be used directly."""
    return ops.depthwise_conv2d(maps, conv.weight, conv.bias, silu=True) if is_plain(conv) else F.silu(conv(maps))
