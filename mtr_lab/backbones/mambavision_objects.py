"""Read objects of the class ``MambaVision`` of its authors: geometry, classes and rates, from its modules."""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import nn

from mtr_lab.backbones.foreign import check_methods
from mtr_lab.errors import UserError


def read_arguments(model: Any, methods: Iterable[str]) -> dict[str, Any] | None:
    """The arguments of our constructor; ``None`` for an object of another class.

    Args:
        model: the object.
        methods: those that our model computes in its place.

    Raises:
        UserError: a variant that is not represented.
    """
    levels = getattr(model, "levels", None)
    stem = getattr(getattr(model, "patch_embed", None), "conv_down", None)
    if not isinstance(levels, nn.ModuleList) or not isinstance(stem, nn.Sequential):
        return None
    if not all(isinstance(getattr(level, "blocks", None), nn.ModuleList) for level in levels):
        return None
    levels, name = cast(Any, levels), type(model).__name__
    check_methods(model, methods)
    arguments = list(inspect.signature(type(model).forward).parameters)
    if len(arguments) != 2:
        raise UserError(f"{name}.forward has the arguments {arguments[2:]}, which the authors' class lacks.")
    tokens = [block for level in levels for block in level.blocks if hasattr(block, "mixer")]
    _check_order(levels)
    scanning = [block.mixer for block in tokens if hasattr(block.mixer, "A_log")]
    if not scanning:
        raise UserError(f"{name} has no Mamba blocks: expected stages of them, as in the authors' class.")
    dim = stem[3].out_channels
    return {
        "dim": dim,
        "in_dim": stem[0].out_channels,
        "depths": tuple(len(level.blocks) for level in levels),
        "window_size": tuple(int(getattr(level, "window_size", 1)) for level in levels),
        "num_heads": tuple(_heads(level) for level in levels),
        "mlp_ratio": tokens[0].mlp.fc1.out_features / tokens[0].mlp.fc1.in_features,
        "d_state": scanning[0].A_log.shape[1],
        "channels": stem[0].in_channels,
        "num_classes": getattr(model.head, "out_features", 0),
        "drop_path_rate": max([0.0, *_rates(model, "drop_prob")]),
        "layer_scale": 1.0 if isinstance(getattr(tokens[0], "gamma_1", None), nn.Parameter) else None,
    }


def copy_settings(model: Any, ours: nn.Module) -> None:
    """Give our norms the numbers that are attributes of the object's: epsilon, and momentum of batch norms.

    Raises:
        UserError: an activation is another one, or a module drops activations.
    """
    _check_dropout(model)
    theirs = dict(model.named_modules())
    for name, module in ours.named_modules():
        for setting in ("eps", "momentum"):
            if hasattr(module, setting):
                setattr(module, setting, getattr(theirs[name], setting))
        if isinstance(module, nn.Conv1d) and getattr(theirs[name], "padding", None) in ("same", (0,)):
            module.padding = theirs[name].padding  # the authors' mixer pads
        if isinstance(module, nn.GELU) and repr(theirs.get(name)) != repr(module):
            raise UserError(f"{name} of {type(model).__name__} is {theirs.get(name)}, expected {module}.")


def _heads(level: Any) -> int:
    """Of its attention blocks; 1 if it has none."""
    mixers: list[Any] = [getattr(block, "mixer", None) for block in level.blocks]
    return next((mixer.num_heads for mixer in mixers if hasattr(mixer, "num_heads")), 1)


def _check_order(levels: Any) -> None:
    """Raise a ``UserError`` unless scans come first, as many as half of the blocks, rounded up."""
    for number, level in enumerate(levels):
        mixers = [block.mixer for block in level.blocks if hasattr(block, "mixer")]
        scans = [hasattr(mixer, "A_log") for mixer in mixers]
        first = (len(scans) + 1) // 2
        if scans != [place < first for place in range(len(scans))]:
            raise UserError(f"levels.{number} has Mamba blocks at {scans}: expected the first {first} of its blocks.")


def _check_dropout(model: nn.Module) -> None:
    """Raise a ``UserError`` if a module drops activations: attention's does so in evaluation, too."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise UserError(
                f"{name} of {type(model).__name__} drops {module.p:g}, which is not represented: set p = 0."
            )


def _rates(model: nn.Module, attribute: str) -> Iterator[float]:
    for module in model.modules():
        rate = getattr(module, attribute, None)
        if isinstance(rate, int | float):
            yield float(rate)
