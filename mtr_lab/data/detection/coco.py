"""COCO annotations: one JSON file per split, with boxes and segmentations."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtr_lab.data.detection.objects import Objects, check_box, flag, number, stated_size
from mtr_lab.data.files import check_unique, check_within, file_stamp
from mtr_lab.data.walk import printable
from mtr_lab.errors import UserError, unknown
from mtr_lab.regular_file import read_regular

_LAYOUT = "Expected DIR/annotations/instances_<split>.json and the images in DIR/<split>, as COCO is released."


class CocoSource:
    """The images in ``root/<split>``, annotated in ``root/annotations/instances_<split>.json``.

    Args:
        root: the dataset's directory.
        split: e.g. ``train2017``.
        classes: names in label order; by default the file's categories, ordered by id.

    Raises:
        UserError: the file is missing or damaged; an annotation refers to an unknown image, category or class; a box
            is invalid.
    """

    def __init__(self, root: Path, split: str, classes: Sequence[str] | None) -> None:
        path = root / "annotations" / f"instances_{split}.json"
        self.location = str(path)
        try:
            content = read_regular(path)
        except OSError as error:
            raise UserError(f"cannot read the annotations {path}: {error.strerror}. {_LAYOUT}") from error
        self._digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        try:
            parsed = json.loads(content)
            images = _by_id(parsed["images"], "images", path)
            names = {
                id: _named(category["name"])
                for id, category in _by_id(parsed["categories"], "categories", path).items()
            }
            annotations = _listed(parsed["annotations"], "annotations", path)
            files = {id: image["file_name"] for id, image in images.items()}
        except (ValueError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the annotations {path} are not valid JSON: {error}. Replace the file.") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the annotations {path} are not in COCO's format: {error!r}. Expected the lists images "
                "(id, file_name), categories (id, name) and annotations."
            ) from error
        if not images:
            raise UserError(f"the annotations {path} list no image. {_LAYOUT}")
        for id, file in files.items():
            if not isinstance(file, str):
                raise UserError(f"{path}: image {id} has the file_name {file!r}, expected text.")
            check_within(file, f"{path}, image {id}")
        check_unique(files.values(), path)
        repeated = [name for name, count in Counter(names.values()).items() if count > 1]
        if repeated:
            ids = ", ".join(str(id) for id, name in names.items() if name == repeated[0])
            raise UserError(f"{path}: the categories {ids} are all called {repeated[0]!r}. Give them different names.")
        self._files = list(files.values())
        self.classes = tuple(classes or names.values())
        self._directory = root / split
        self.degenerate = 0
        rows, segmentations = defaultdict(list), defaultdict(list)
        for annotation in annotations:
            image, category, box, ignore, segmentation = _parse(annotation, path)
            if image not in images:
                raise UserError(
                    f"{path}: annotation {annotation.get('id')} refers to image {image!r}, which is not in the file."
                )
            if category not in names:
                raise unknown(f"category_id in {path}:", repr(category), map(repr, names))
            if names[category] not in self.classes:
                raise unknown(f"class in {path}:", names[category], self.classes)
            if check_box(box, f"{path}, annotation {annotation.get('id')}"):
                rows[image].append((box, self.classes.index(names[category]), ignore))
                segmentations[image].append(segmentation)
            else:
                self.degenerate += 1
        self._objects = [
            Objects.of(rows[id], segmentations[id], stated_size(image.get("height"), image.get("width")))
            for id, image in images.items()
        ]

    def __len__(self) -> int:
        return len(self._files)

    def id(self, index: int) -> str:
        """The image's file name."""
        return printable(self._files[index])

    def fingerprint(self) -> str:
        """A hash of the annotations, and of every image's file size and modification time."""
        digest = hashlib.blake2b(self._digest.encode(), digest_size=16)
        for index in range(len(self)):
            digest.update(f"{self.id(index)}\0{file_stamp(self.path(index))}\n".encode())
        return digest.hexdigest()

    def path(self, index: int) -> Path:
        return self._directory / self._files[index]

    def objects(self, index: int) -> Objects:
        return self._objects[index]


def _named(name: Any) -> str:
    """A category's name.

    Raises:
        TypeError: it is neither a text nor a number, or blank.
    """
    if not isinstance(name, str | int | float) or not str(name).strip():
        raise TypeError(f"a category is called {name!r}")
    return str(name).strip()


def _listed(records: Any, name: str, path: Path) -> list[Any]:
    """A list of the file.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(records, list):
        kind = "null" if records is None else f"a value of type {type(records).__name__}"
        raise UserError(f"the annotations {path}: {name} is {kind}, expected a list (empty, if there are none).")
    return records


def _by_id(records: Any, name: str, path: Path) -> dict[Any, Any]:
    """The records of a list by their ids, sorted.

    Raises:
        UserError: an id is neither a number nor a text, or occurs twice.
        KeyError, TypeError: a record has no id, or ids cannot be sorted.
    """
    by_id: dict[Any, Any] = {}
    for record in _listed(records, name, path):
        if isinstance(record["id"], bool) or not isinstance(record["id"], int | str):
            raise UserError(f"{path}: one of {name} has the id {record['id']!r}, expected a whole number.")
    for record in sorted(records, key=lambda record: record["id"]):
        if record["id"] in by_id:
            raise UserError(f"{path}: two {name} have the id {record['id']!r}. Give them different ids.")
        by_id[record["id"]] = record
    return by_id


def _parse(annotation: Any, path: Path) -> tuple[int | str, int | str, list[float], bool, Any]:
    """Image, category, box (left, top, right, bottom), whether to ignore it, and segmentation."""
    try:
        image, category = annotation["image_id"], annotation["category_id"]
        hash((image, category))  # ids are keys of dictionaries below
        if not isinstance(annotation["bbox"], list):
            raise TypeError("bbox is not a list")
        left, top, width, height = map(number, annotation["bbox"])
        ignore, segmentation = flag(annotation.get("iscrowd", 0)), annotation.get("segmentation") or None
        return image, category, [left, top, left + width, top + height], ignore, segmentation
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise UserError(
            f"{path}: cannot read the annotation {str(annotation)[:100]}: {error!r}. Expected image_id, category_id "
            "and bbox, four numbers (left, top, width, height)."
        ) from error
