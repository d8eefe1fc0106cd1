"""Class names, and how a dataset's labels meet a model's outputs."""

from collections.abc import Sequence
from functools import cache

from timm.data import ImageNetInfo

from mtr_lab.errors import UserError, unknown


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1000 WordNet ids of ImageNet-1k in the order of the outputs of every ImageNet-1k model."""
    return tuple(ImageNetInfo("imagenet-1k").label_names())


def name_classes(source_classes: Sequence[str] | None, classes: str | Sequence[str] | None) -> Sequence[str] | None:
    """The names of a dataset's labels: what it says itself, or ``classes``, which says it in label order.

    Args:
        source_classes: names the files or the dataset's metadata give, if any.
        classes: ``None``, a list of names for labels 0, 1, 2 …, or ``"imagenet-1k"``.

    Raises:
        UserError: ``classes`` is not a known set, does not name every label, or cannot be in the labels' order.
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
    """The model output that stands for each label of the dataset, or ``None`` if labels are outputs already.

    Names known on both sides decide, so ten ImageNet classes meet the right ten of a thousand outputs whatever their
    order. With names on one side only, or on none, labels are taken as outputs if there are as many of both.

    Args:
        dataset_classes: class names in label order; ``None`` if the dataset only numbers its classes.
        model_classes: class names in the order of the model's outputs; ``None`` if its weights do not say.
        num_classes: how many outputs the model has.

    Raises:
        UserError: a dataset class is not among the model's, or the counts differ and no names can decide.
    """
    if model_classes is not None and len(model_classes) != num_classes:
        raise UserError(
            f"the model has {num_classes} outputs but {len(model_classes)} class names ({_quote_some(model_classes)}): "
            "give one name for each output, or none."
        )
    if dataset_classes is None:
        return None
    if model_classes is None:
        if len(dataset_classes) == num_classes:
            return None
        raise UserError(
            f"the dataset has {len(dataset_classes)} classes ({_quote_some(dataset_classes)}) and the model "
            f"{num_classes} outputs, whose names its weights do not say: choose weights trained on these classes, "
            "train the model on this dataset, or choose another dataset."
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
