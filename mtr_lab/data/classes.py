"""Class names, and the mapping from a dataset's labels to a model's outputs."""

from collections.abc import Sequence
from functools import cache

from timm.data import ImageNetInfo

from mtr_lab.errors import UserError, unknown


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1000 WordNet ids of ImageNet-1k, in the order of the model outputs."""
    return tuple(ImageNetInfo("imagenet-1k").label_names())


def readable_name(label: str) -> str:
    """The English name of a class of ImageNet, by its WordNet id; other labels as they are."""
    if len(label) == 9 and label[0] == "n" and label[1:].isdigit():
        try:
            return str(ImageNetInfo().label_name_to_description(label)).split(",")[0]
        except KeyError:
            return label
    return label


def name_classes(source_classes: Sequence[str] | None, classes: str | Sequence[str] | None) -> Sequence[str] | None:
    """The names of a dataset's labels: from ``source_classes`` if the names are known, else from ``classes``.

    Args:
        source_classes: names from the class folders or the dataset's metadata, if any.
        classes: ``None``, a list of names for labels 0, 1, 2 …, or ``"imagenet-1k"``.

    Raises:
        UserError: ``classes`` is not a known set, does not name every label, or differs from the labels in order.
    """
    if classes is None:
        return source_classes
    if isinstance(classes, str) and classes != "imagenet-1k":
        raise unknown("dataset.classes", classes, ["imagenet-1k"])
    names = imagenet_classes() if isinstance(classes, str) else tuple(classes)
    if source_classes is None:
        return names
    if set(source_classes) <= set(names):
        return source_classes
    if isinstance(classes, str) and list(source_classes) == sorted(source_classes):
        raise UserError(
            f"dataset.classes={classes}: the dataset numbers its classes alphabetically "
            f"({_quote_some(source_classes)}), not in the order of {classes}. Rename the class folders to its names "
            f"({_quote_some(names)}), or list the name of each in dataset.classes."
        )
    if len(source_classes) != len(names):
        raise UserError(
            f"dataset.classes names {len(names)} classes, the dataset has {len(source_classes)} "
            f"({_quote_some(source_classes)}): name each of them, in this order, or leave dataset.classes out."
        )
    return names


def map_classes(
    dataset_classes: Sequence[str] | None, model_classes: Sequence[str] | None, num_classes: int
) -> list[int] | None:
    """The index of the model output for each label of the dataset, or ``None`` if labels are indices of outputs.

    If both sides have class names, labels are matched by name: ten ImageNet classes get the right ten of 1000 outputs,
    in any order. Otherwise, labels are indices of outputs, and both sides must have the same number of classes.

    Args:
        dataset_classes: class names in label order; ``None`` if the dataset only numbers its classes.
        model_classes: class names in the order of the model's outputs; ``None`` if its weights do not name them.
        num_classes: number of the model's outputs.

    Raises:
        UserError: the model lacks a class of the dataset, or the numbers of classes differ and one side has no names.
    """
    if model_classes is not None and len(model_classes) != num_classes:
        raise UserError(
            f"the model has {num_classes} outputs but {len(model_classes)} class names ({_quote_some(model_classes)}): "
            f"these weights are for other classes, so set backbone.num_classes={len(model_classes)}."
        )
    if dataset_classes is None:
        return None
    if model_classes is None:
        if len(dataset_classes) == num_classes:
            return None
        raise UserError(
            f"the dataset has {len(dataset_classes)} classes ({_quote_some(dataset_classes)}) and the model "
            f"{num_classes} outputs without class names: choose weights trained on these classes (those of a .pth file "
            f"need backbone.num_classes={len(dataset_classes)}), train the model on this dataset, or choose another."
        )
    output = {name: index for index, name in enumerate(model_classes)}
    missing = [name for name in dataset_classes if name not in output]
    if missing:
        raise UserError(
            f"the dataset has {len(dataset_classes)} classes, the model {num_classes}, and {len(missing)} of the "
            f"dataset's are not among the model's: {_quote_some(missing)} (the model knows "
            f"{_quote_some(model_classes)}). Rename the class folders to the model's names, list the names in label "
            "order in dataset.classes (dataset.classes=imagenet-1k where label i is ImageNet-1k class i), or choose "
            "weights trained on these classes."
        )
    return [output[name] for name in dataset_classes]


def _quote_some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{shown}, …" if len(names) > 3 else shown
