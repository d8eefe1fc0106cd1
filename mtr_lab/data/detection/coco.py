"""COCO annotations: one JSON file per split, with boxes and segmentations."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtr_lab.data.detection.objects import Objects, check_box
from mtr_lab.errors import UserError, unknown

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
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the annotations {path}: {error.strerror}. {_LAYOUT}") from error
        self._digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        try:
            parsed = json.loads(content)
            images = sorted(parsed["images"], key=lambda image: image["id"])
            names = {
                category["id"]: str(category["name"])
                for category in sorted(parsed["categories"], key=lambda category: category["id"])
            }
            annotations = list(parsed["annotations"])
            self._files = [str(image["file_name"]) for image in images]
            index_of = {image["id"]: index for index, image in enumerate(images)}
        except ValueError as error:
            raise UserError(f"the annotations {path} are not valid JSON: {error}. Replace the file.") from error
        except (KeyError, TypeError) as error:
            raise UserError(
                f"the annotations {path} are not in COCO's format: {error!r}. Expected the lists images "
                "(id, file_name), categories (id, name) and annotations."
            ) from error
        if not images:
            raise UserError(f"the annotations {path} name no image. {_LAYOUT}")
        self.classes = tuple(classes or names.values())
        self._directory = root / split
        self.degenerate = 0
        rows, segmentations = defaultdict(list), defaultdict(list)
        for annotation in annotations:
            image, category, box, ignore, segmentation = _parse(annotation, path)
            if image not in index_of:
                raise UserError(
                    f"{path}: annotation {annotation.get('id')} refers to image {image}, which is not in the file."
                )
            if category not in names:
                raise unknown(f"category_id in {path}:", category, map(str, names))
            if names[category] not in self.classes:
                raise unknown(f"class in {path}:", names[category], self.classes)
            if check_box(box, f"{path}, annotation {annotation.get('id')}"):
                rows[index_of[image]].append((box, self.classes.index(names[category]), ignore))
                segmentations[index_of[image]].append(segmentation)
            else:
                self.degenerate += 1
        self._objects = [Objects.of(rows[i], segmentations[i]) for i in range(len(images))]

    def __len__(self) -> int:
        return len(self._files)

    def id(self, index: int) -> str:
        """The image's file name."""
        return self._files[index]

    def fingerprint(self) -> str:
        """A hash of the annotations, and of every image's file size and modification time."""
        digest = hashlib.blake2b(self._digest.encode(), digest_size=16)
        for index, id in enumerate(self._files):
            stat = self.path(index).stat() if self.path(index).is_file() else None
            digest.update(f"{id}\0{stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())
        return digest.hexdigest()

    def path(self, index: int) -> Path:
        return self._directory / self._files[index]

    def objects(self, index: int) -> Objects:
        return self._objects[index]


def _parse(annotation: Any, path: Path) -> tuple[int | str, int | str, list[float], bool, Any]:
    """Image, category, box (left, top, right, bottom), whether to ignore it, and segmentation."""
    try:
        image, category = annotation["image_id"], annotation["category_id"]
        hash((image, category))  # ids are keys of dictionaries below
        left, top, width, height = map(float, annotation["bbox"])
        ignore, segmentation = bool(annotation.get("iscrowd", 0)), annotation.get("segmentation") or None
        return image, category, [left, top, left + width, top + height], ignore, segmentation
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: cannot read the annotation {str(annotation)[:100]}: {error!r}. Expected image_id, category_id "
            "and bbox, four numbers (left, top, width, height)."
        ) from error
