"""When the parameters of a module may be used in place of a call of it."""

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def as_built(module: nn.Module) -> nn.Module:
    """The module, marked as one whose parameters its owner may use in place of a call; one put in its place is not."""
    module.as_built = True  # type: ignore[assignment]
    return module


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's ``forward`` and nothing else; hooks on all modules do not count."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in module.__dict__


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module does nothing but what its class and its parameters say.

    False for any module that was put in its place (an adapter, a quantised one, one of another geometry), for one with
    hooks or another ``forward``, and for one whose weight is quantised or distributed: then it has to be called.
    """
    return (
        type(module) in KINDS
        and "as_built" in module.__dict__
        and is_untouched(module)
        and not is_traceable_wrapper_subclass(module.weight)
    )
