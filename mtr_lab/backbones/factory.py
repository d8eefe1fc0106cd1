"""Build a registered model from its configuration and the caller's arguments."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

import torch
from torch import nn

from mtr_lab.backbones import weights
from mtr_lab.backbones.hub import is_address
from mtr_lab.backbones.keywords import translate
from mtr_lab.backbones.pretrained import IMAGENET, label_names, timm_config
from mtr_lab.errors import UserError, check_number, unknown

Model = TypeVar("Model", bound=nn.Module)


def build(
    family: type[Model],
    registered: Mapping[str, Any],
    pretrained: bool,
    defaults: Mapping[str, Any],
    kwargs: Mapping[str, Any],
) -> Model:
    """Construct a model of a family and load its weights if asked: the entry point behind every registered name.

    The model gets ``pretrained_cfg`` (timm's data configuration, with the model's input size and classes) and
    ``weights`` (a dict of :class:`~mtr_lab.backbones.weights.Weights`). On the meta device no weights are loaded.

    Args:
        family: a :class:`Backbone` that is a module and has a method ``fit_weights``. The annotations of its
            constructor declare its arguments: ``int``, ``float``, ``bool``, ``str``, tuples of these, or ``None``.
        registered: the configuration of the name, see ``mtr_lab.backbones.pretrained``.
        pretrained: load the weights of the configuration. The head stays untrained if it has another number of classes.
        defaults: the arguments of the variant.
        kwargs: the caller's arguments, with the upstream constructors' names, or ``in_chans`` for ``channels``; the
            family's ``keywords`` has those that are not arguments of its constructor; ``device`` and ``dtype``;
            ``checkpoint`` (a local file, ``hf://OWNER/REPOSITORY/FILE`` or ``https://…``, used instead of the
            registered weights; a local safetensors file gives ``num_classes``, too), ``revision`` (branch, tag or
            commit on the hub), ``checkpoint_key`` and ``checkpoint_grid`` (see
            ``mtr_lab.backbones.weights.Checkpoint``), ``new_head`` (if the checkpoint has
            other classes or none, leave the head untrained instead of raising an error), the arguments of timm's
            factory, and for a model that returns feature maps ``features_only`` and ``out_indices`` (blocks, or how
            many of the last).

    Returns:
        The model, or with ``features_only`` timm's wrapper of it.

    Raises:
        UserError: an unknown argument; weights that cannot be downloaded, cannot be read, or do not fit.
    """
    name, kwargs = registered["architecture"], dict(kwargs)
    revision, checkpoint, any_head = kwargs.pop("revision", "main"), _checkpoint(kwargs), kwargs.pop("new_head", False)
    config = timm_config(registered, kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None))
    features_only, out_indices = kwargs.pop("features_only", False), kwargs.pop("out_indices", 3)
    feature_class = kwargs.pop("feature_cls", "getter")
    for key in ("cache_dir", "pretrained_model_args"):  # arguments of timm's own loader
        if kwargs.pop(key, None) is not None:
            raise UserError(f"{key} of {name} cannot be set: give a file as checkpoint=; HF_HUB_CACHE moves the cache.")
    if "in_chans" in kwargs:
        kwargs["channels"] = kwargs.pop("in_chans")
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(f"dtype of {name}={dtype!r}: expected a floating-point torch.dtype, such as torch.bfloat16.")
    try:
        device = None if device is None else torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"device of {name}={device!r}: expected a torch.device, such as 'cuda'.") from error
    if not isinstance(any_head, bool):
        raise UserError(f"new_head of {name}={any_head!r}: expected true or false.")
    kwargs = translate(name, getattr(family, "keywords", {}), kwargs)
    local = checkpoint is not None and not is_address(checkpoint.file)
    if kwargs.get("num_classes") is None and checkpoint is not None and local and not any_head:
        classes = weights.checkpoint_classes(checkpoint.file, registered["classifier"])
        kwargs |= {} if classes is None else {"num_classes": classes}
    _check_arguments(name, family, kwargs)
    if not isinstance(pretrained, bool):
        raise UserError(f"pretrained of {name}={pretrained}: expected true or false.")

    model: Any = family(**{**defaults, **kwargs})
    model.weights = asdict(weights.Weights("random"))
    channels, *frames, height, width = model.input_shape
    video = bool(frames) and registered.get("num_frames") is None
    if video:  # the registered weights and classes are those of the model for images
        config = {key: value for key, value in config.items() if key not in ("hf_hub_id", "hf_hub_filename", "url")}
    same_classes = not video and model.num_classes == config["num_classes"]
    model.pretrained_cfg = {
        **config,
        "architecture": name,
        "num_classes": model.num_classes,
        "input_size": (channels, height, width),  # of one frame of a video
        "first_conv": registered["first_conv"],
        "classifier": registered["classifier"],
        "label_names": label_names(config) if same_classes else None,
    }
    model.default_cfg = model.pretrained_cfg
    published = checkpoint is None
    if checkpoint is not None:
        checkpoint = replace(checkpoint, revision=revision)
        names = weights.checkpoint_label_names(checkpoint.file) if local else None
        if names or registered["label_names"] != IMAGENET:
            model.pretrained_cfg["label_names"] = names  # the user's own classes
    elif pretrained and video:
        raise UserError(
            f"no weights are registered for {name} with num_frames: pass a file's path (backbone.checkpoint=PATH, "
            "create_model(..., checkpoint=PATH)), or take random ones (backbone.pretrained=false, pretrained=False)."
        )
    elif pretrained:
        any_head = True
        checkpoint = weights.Checkpoint(_pretrained_file(name, config), revision)
    if checkpoint is not None and not weights.is_meta(model):
        unchanged = weights.load_weights(model, checkpoint, published=published, any_head=any_head)
        if unchanged and Path(checkpoint.file).name == _published_file(registered):
            model.weights = model.weights | {"published_top1": registered["published_top1"]}
    if device is not None or dtype is not None:
        model.to(device=device, dtype=dtype)
    if features_only:
        return _feature_extractor(model, out_indices, feature_class)
    return model


def _checkpoint(kwargs: dict[str, Any]) -> weights.Checkpoint | None:
    """The checkpoint that the arguments name, which are removed from them.

    Raises:
        UserError: something is said about a file, and no file is named; or the grid is not two numbers.
    """
    file, key, grid = (kwargs.pop(name, None) for name in ("checkpoint", "checkpoint_key", "checkpoint_grid"))
    for argument, value in (("checkpoint_key", key), ("checkpoint_grid", grid)):
        if value is not None and file is None:
            raise UserError(f"{argument}={value} is about a file: give it, checkpoint=FILE (backbone.checkpoint=FILE).")
    if file is None:
        return None
    if grid is not None:
        if not isinstance(grid, list | tuple) or len(grid) != 2:
            raise UserError(f"checkpoint_grid={grid}: expected the rows and columns of patches, [14,14] for instance.")
        for side in grid:
            check_number("checkpoint_grid", side, int, 1)
    return weights.Checkpoint(str(file), key=key if key is None else str(key), grid=grid)


def _pretrained_file(name: str, config: Mapping[str, Any]) -> str:
    """The checkpoint of a configuration: a local file, or one on the hub."""
    if config.get("state_dict") is None:
        if config.get("file"):
            return str(config["file"])
        if config.get("hf_hub_id"):
            return f"hf://{config['hf_hub_id']}/{config.get('hf_hub_filename') or 'model.safetensors'}"
        if config.get("url"):
            return str(config["url"])
    raise UserError(
        f"pretrained_cfg of {name} names neither a file nor a repository on the Hugging Face Hub (hf_hub_id): pass "
        "checkpoint=FILE, or call load_state_dict on the model."
    )


def _published_file(registered: Mapping[str, Any]) -> str | None:
    """The name of the authors' file, ``None`` if there is none."""
    return registered.get("hf_hub_filename") or Path(registered.get("url") or "").name or None


def _feature_extractor(model: Any, out_indices: int | Sequence[int], feature_class: Any) -> Any:
    """timm's wrapper: images to the maps of ``forward_intermediates``."""
    from timm.models._features import FeatureGetterNet

    if feature_class not in ("getter", FeatureGetterNet):
        raise UserError(
            f"feature_cls={feature_class}: expected 'getter', since the tokens of a block are not an image."
        )
    extractor: Any = FeatureGetterNet(model, out_indices=tuple(model.blocks_at(out_indices)))
    no_head = ("num_classes", "classifier", "label_names")
    extractor.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in no_head}
    extractor.default_cfg = extractor.pretrained_cfg
    return extractor


def _check_arguments(name: str, family: type[nn.Module], kwargs: Mapping[str, Any]) -> None:
    """Raise a ``UserError`` unless the constructor of the family takes these arguments."""
    parameters = _parameters(family)
    for key, value in kwargs.items():
        if key not in parameters:
            raise unknown(f"argument of {name}", key, parameters)
        most = 0.99 if key.endswith("_rate") else _MOST.get(key, 2**16)
        _check_argument(f"{key} of {name}", value, parameters[key].annotation, 0 if key == "num_classes" else 1, most)


_MOST = {"depth": 1000, "num_classes": 2**24}
"""Of these arguments; a slip of the keyboard may ask for a model that takes hours to build."""


def _parameters(family: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """Of the constructor; where it has ``**kwargs``, those of the next class that has a constructor, too."""
    parameters = dict(list(inspect.signature(family.__init__).parameters.items())[1:])  # without self
    if parameters.pop("kwargs", None) is None:
        return parameters
    return {**parameters, **_parameters(family.__mro__[1])}


def _check_argument(label: str, value: Any, annotation: Any, least_int: int, most: float) -> None:
    """Raise a ``UserError`` unless a value fits its annotation: an int, a float ≥ 0, a bool, or a tuple of numbers.

    The constructor checks values of other types itself.
    """
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    if value is None and NoneType in kinds:
        return
    for kind in kinds:
        if get_origin(kind) is tuple and isinstance(value, list | tuple):
            item_kind, length = get_args(kind)
            if length is Ellipsis or len(value) == len(get_args(kind)):
                for item in value:
                    _check_argument(label, item, item_kind, least_int, most)
                return
    if int in kinds or float in kinds:
        check_number(label, value, float if float in kinds else int, 0 if float in kinds else least_int, most)
    elif bool in kinds and not isinstance(value, bool):
        raise UserError(f"{label}={value}: expected true or false.")
