"""Hugging Face datasets in random access: a table with a column of images and a column of labels."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtr_lab.errors import UserError, unknown
from mtr_lab.regular_file import read_regular


def open_table(
    source: str, name: str, root: str | None, split: str, image_column: str | None, label_column: str | None
) -> "TableSource":
    """Load a split of a Hugging Face dataset.

    Args:
        source: the value of ``dataset.source``.
        name: a name on the hub, or a directory.
        root: where to keep what is downloaded; ``None``: the package's cache.
        split: name of the split.
        image_column: ``None``: the column ``image``, else the only column of images.
        label_column: ``None``: the column ``label``, else the only column of class labels.

    Raises:
        UserError: there is no such column, or several could be meant.
    """
    import datasets

    table = datasets.load_dataset(name, split=split, cache_dir=root)
    image = _column(table.features, "image", image_column, datasets.Image)
    label = _column(table.features, "label", label_column, datasets.ClassLabel)
    try:
        return TableSource(source, table.cast_column(image, datasets.Image(decode=False)), split, image, label)
    except (TypeError, datasets.table.CastError) as error:
        raise UserError(f"dataset.image_column={image} holds no images: {error}.") from error


def _column(features: Mapping[str, Any], name: str, given: str | None, kind: type) -> str:
    """The column to read: the one given, else the one called ``name``, else the only one of a kind."""
    option = f"dataset.{name}_column"
    if given is not None:
        if given not in features:
            raise unknown(option, given, features)
        return given
    fitting = [column for column, feature in features.items() if isinstance(feature, kind)]
    if name in features:
        return name
    if len(fitting) != 1:
        raise UserError(
            f"{option}: the dataset has no column {name!r}. Set it to one of {', '.join(fitting or features)}."
        )
    return fitting[0]


def content_of(image: Mapping[str, Any] | None) -> bytes:
    """The encoded bytes of a cell of images that is not decoded.

    Raises:
        ValueError: the cell is null.
        OSError: its file cannot be read.
    """
    if not image or not (image["bytes"] or image["path"]):
        raise ValueError("its image is null")
    return image["bytes"] or read_regular(Path(image["path"]))


class TableSource:
    """The encoded images of a Hugging Face dataset.

    Labels that are texts are numbered in sorted order.

    Args:
        location: the value of ``dataset.source``.
        table: a ``datasets.Dataset`` whose column ``image`` is not decoded.
        split: name of the split.
        image, label: names of the columns.
    """

    def __init__(self, location: str, table: Any, split: str, image: str, label: str) -> None:
        self.location = location
        self._table, self._split, self._image, self._label = table, split, image, label
        feature = table.features[label]
        self.classes: Sequence[str] | None = getattr(feature, "names", None)
        self._numbers: dict[str, int] | None = None
        if getattr(feature, "dtype", None) in ("string", "large_string"):
            self.classes = sorted(text for text in table.unique(label) if text is not None)
            self._numbers = {text: number for number, text in enumerate(self.classes)}
        self.num_images: int | None = len(table)

    def __len__(self) -> int:
        return len(self._table)

    def id(self, index: int) -> str:
        """The file name, if the table has it, else the index."""
        image = self._table[index][self._image]
        return str((image and image["path"]) or index)

    def holdout_key(self, index: int) -> str:
        """The index: a file name is read together with its image."""
        return str(index)

    def fingerprint(self) -> str:
        """A hash that changes with the data: the source, the split, the number of images, the table's own hash."""
        parts = [self.location, self._split, len(self), self._table._fingerprint]
        if (self._image, self._label) != ("image", "label"):
            parts.append([self._image, self._label])
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded bytes and the label.

        Raises:
            ValueError: one of them is null, or the label is not a number.
        """
        row = self._table[index]
        label = row[self._label]
        if label is None:
            raise ValueError("its label is null")
        return content_of(row[self._image]), int(label if self._numbers is None else self._numbers[label])
