"""Objects of the authors' own classes: a model of ours computes in their place, with the very same parameters.

A family recognises its authors' objects by their attributes and builds a model of ours without weights for one. That
model gets the object's ``Parameter`` objects themselves, so that changes in place, ``load_state_dict`` and ``.to`` of
the object reach it, and no memory is needed.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from mtr_lab.backbones.interface import MEMBERS, Backbone, missing_members
from mtr_lab.backbones.plain import KINDS, has_hooks, is_untouched
from mtr_lab.errors import UserError

Reader = Callable[[nn.Module], nn.Module | None]
"""An object -> a model of ours that computes the same, without weights; ``None`` if the object has another class.

Raises a ``UserError`` for a variant that the family does not represent. The model's ``stands_for`` names its methods
that compute what methods of the object compute; its method ``copy_settings`` gives it what may change in the object
besides parameters and modules, and is called before each forward pass.
"""

_readers: dict[str, Reader] = {}
_STATELESS = ("Identity", "SiLU", "Dropout", "DropPath", "AdaptiveAvgPool2d")
"""Classes of modules that need no counterpart in our model; the family reads their rates."""


def recognises(family: str) -> Callable[[Reader], Reader]:
    """Register a family's reader under the name of the family."""

    def register(reader: Reader) -> Reader:
        _readers[family] = reader
        return reader

    return register


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in the wrappers of ``torch.compile`` and of data parallelism."""
    while True:
        children = dict(model.named_children())
        if "_orig_mod" in children:
            model = children["_orig_mod"]
        elif list(children) == ["module"] and missing_members(model):
            model = children["module"]
        else:
            return model


def as_backbone(model: nn.Module, function: str) -> Backbone:
    """The backbone that ``function`` got: the model in its wrappers, or the model of ours in an object's place.

    Raises:
        UserError: it is neither, or an object of a variant that is not represented.
    """
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    missing = missing_members(model)
    if not missing:
        return model  # type: ignore[return-value]
    ours = _in_place_of(model) if isinstance(model, nn.Module) else None
    if ours is not None:
        return ours
    expected, name = "a model made by mtr_lab.create_model", type(model).__name__
    if len(missing) <= len(MEMBERS) // 2:
        lacks = f"which lacks {', '.join(missing)} of mtr_lab.backbones.Backbone"
        raise UserError(f"{function} expects {expected}, got {name}, {lacks}.")
    *families, last = sorted(_readers)
    classes = f"an object of the authors' class of {', '.join(families)} or {last}"
    raise UserError(f"{function} expects {classes}, or {expected}, got {name}.")


class Substitute:
    """A model of ours that computes in an object's place."""

    def __init__(self, model: nn.Module, ours: Any) -> None:
        self.ours = ours
        self._parts: list[Any] = []
        self._share(model)

    def follow(self, model: nn.Module) -> Any:
        """Our model, with the object's present parameters, settings and mode.

        Raises:
            UserError: the object has got parameters that do not fit, hooks, or other modules.
        """
        parts = list(_parts(model))
        if len(parts) != len(self._parts) or any(a is not b for a, b in zip(parts, self._parts, strict=True)):
            _read(model)  # raises a UserError if a new part is a variant that is not represented
            self._share(model)
        self.ours.copy_settings(model)
        if self.ours.training != model.training:
            self.ours.train(model.training)
        return self.ours

    def _share(self, model: nn.Module) -> None:
        _check_modules(model, self.ours)
        state, name = model.state_dict(keep_vars=True), type(model).__name__
        expected = {key: value.shape for key, value in self.ours.state_dict().items()}
        shapes = {key: value.shape for key, value in state.items()}
        differ = sorted(key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key))
        if differ:
            names = ", ".join(differ[:5]) + (", …" if len(differ) > 5 else "")
            raise UserError(
                f"the parameters of this {name} are not those that its attributes describe: {names}. If you changed "
                "the patched object, call unpatch and patch again."
            )
        self.ours.load_state_dict(state, strict=True, assign=True)
        self.ours.train(model.training)
        self._parts = list(_parts(model))


def stand_in(model: nn.Module) -> Any:
    """Our model that computes in the place of a patched object, which may be wrapped; ``None`` for any other model."""
    routed = vars(unwrapped(model)).get("forward")
    return routed.substitute.ours if isinstance(routed, Routed) else None


def _in_place_of(model: nn.Module) -> Any:
    """Our model in a patched object's place, a new one for another object; ``None`` if no family recognises it."""
    if isinstance(routed := vars(model).get("forward"), Routed):
        return routed.substitute.follow(model)
    ours = _read(model)
    if ours is None:
        return None
    kind = type(model)
    ours.weights = ours.weights | {"source": f"an object of {kind.__module__}.{kind.__qualname__}"}
    return Substitute(model, ours).ours


def _read(model: nn.Module) -> Any:
    """Our model for an object, without weights; ``None`` if no family recognises it.

    Raises:
        UserError: a variant that is not represented, or an object that has but a part of the authors' modules.
    """
    for family, reader in _readers.items():
        try:
            with torch.device("meta"):
                ours = reader(model)
        except (AttributeError, IndexError) as error:
            raise UserError(
                f"{type(model).__name__} has the mixers of {family}, but not all modules and attributes of its "
                f"authors' class: {error}."
            ) from error
        if ours is not None:
            return ours
    return None


class Routed:
    """Takes the place of a method of an object: the same signature, computed by the substitute."""

    def __init__(self, model: nn.Module, substitute: Substitute, method: str) -> None:
        self.substitute = substitute
        self._model, self._method = model, method

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(type(self._model), self._method).__get__(self._model))

    @property
    def __code__(self) -> CodeType:  # torch.export reads where the method is defined
        code: CodeType = getattr(type(self._model), self._method).__code__
        return code

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        images = args[0] if len(args) == 1 and not kwargs else self._images(args, kwargs)
        if torch.compiler.is_compiling():  # the comparison of all parts is not for a graph
            ours = self.substitute.ours
            if ours.training != self._model.training:
                ours.train(self._model.training)
        else:
            ours = self.substitute.follow(self._model)
        return getattr(ours, ours.stands_for[self._method])(images)

    def _images(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first argument, if all others have their defaults."""
        signature = self.__signature__
        given = signature.bind(*args, **kwargs).arguments  # raises the TypeError that the object's method raises
        (_, images), *others = given.items()
        for name, value in others:
            if value is not signature.parameters[name].default:
                raise UserError(
                    f"{name}={value!r} of a patched {type(self._model).__name__}.{self._method} is not represented: "
                    "leave it out, or call mtr_lab.unpatch first."
                )
        return images


def route(model: nn.Module, ours: Any) -> None:
    """Let ``ours`` compute what the object's methods compute, until :func:`unroute`; nothing if it is our model."""
    model = unwrapped(model)
    if model is ours or stand_in(model) is not None:
        return
    substitute = Substitute(model, ours)
    for method in filter(partial(hasattr, type(model)), ours.stands_for):
        setattr(model, method, Routed(model, substitute, method))


def unroute(model: nn.Module) -> Any:
    """Undo :func:`route`: the object computes by itself. Returns the model that stood in for it, ``None`` for none."""
    if not isinstance(model, nn.Module):
        return None
    model = unwrapped(model)
    ours = stand_in(model)
    for name in [name for name, value in vars(model).items() if isinstance(value, Routed)]:
        delattr(model, name)
    return ours


def check_methods(model: nn.Module, methods: Iterable[str]) -> None:
    """Raise a ``UserError`` if a method was replaced, or is not that of the class which first defined it."""
    for method in methods:
        defining = [kind for kind in type(model).__mro__[:-2] if method in vars(kind) and not _is_torch(kind)]
        if len(defining) > 1 or not isinstance(vars(model).get(method), Routed | None):
            replaced = f"{type(model).__name__}.{method}"
            base = f" is not {defining[-1].__name__}.{method}" if len(defining) > 1 else " was replaced in this object"
            raise UserError(f"{replaced}{base}: mtr_lab computes what the authors' own class does, and no other.")


def _check_modules(model: nn.Module, ours: nn.Module) -> None:
    """Raise a ``UserError`` if a module of the object does anything that its counterpart in our model does not."""
    counterparts: dict[str, Any] = dict(ours.named_modules())
    equivalents, sets_forward = getattr(ours, "equivalents", {}), getattr(ours, "sets_forward", ())
    for name, module in model.named_modules():
        counterpart = counterparts.get(name)
        kind = equivalents.get(type(module).__name__, type(module))
        if has_hooks(module):
            raise UserError(
                f"{name or kind.__name__} has a hook, which mtr_lab would not call: remove it, or load the object's "
                "state dict into a model of mtr_lab.create_model, which calls hooks."
            )
        if not name:
            continue
        built_in = type(counterpart) in KINDS
        stateless = counterpart is None or type(counterpart).__name__ in _STATELESS
        if (built_in and kind is not type(counterpart)) or (stateless and kind.__name__ not in _STATELESS):
            expected = f"expected {type(counterpart).__name__} of torch.nn" if built_in else "which has no counterpart"
            raise UserError(
                f"{name} is {kind.__module__}.{kind.__qualname__}, {expected}: merge adapters, undo parametrisations "
                "and quantisation first."
            )
        if isinstance(counterpart, _ConvNd) and repr(module) != repr(counterpart):
            raise UserError(f"{name} is {module}, the authors' is {counterpart}: mtr_lab computes the latter alone.")
        if name.rpartition(".")[2] not in sets_forward:
            check_methods(module, ["forward"])


def _is_torch(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.")


def _parts(model: nn.Module) -> Iterator[Any]:
    """Modules, parameters, buffers, and whether modules are untouched, in order. Much faster than ``named_modules``."""
    modules = [model]
    for module in modules:  # which grows
        yield not has_hooks(module) if module is model else is_untouched(module)
        yield from module._parameters.values()
        yield from module._buffers.values()
        for child in module._modules.values():
            if child is not None:
                yield child
                modules.append(child)
