"""Images annotated as COCO does: one JSON file a split, with boxes and outlines."""

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
    """The images of ``annotations/instances_<split>.json``, which lie in ``root/<split>``.

    Args:
        root: the directory.
        split: such as ``train2017``.
        classes: names in the order of the labels; by default the file's categories in the order of their ids.

    Raises:
        UserError: the file is missing or damaged, an annotation is of an image or category the file does not have or
            of a class not among ``classes``, a box is none.
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
                f"the annotations {path} are not COCO's: {error!r}. Expected lists images (id, file_name), categories "
                "(id, name) and annotations."
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
                raise UserError(f"{path}: annotation {annotation.get('id')} is of image {image}, which is not there.")
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
        """A hash of the annotations, and of every image's size and time of change."""
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
    """Image, category, box as edges, whether to ignore it, and outline."""
    try:
        image, category = annotation["image_id"], annotation["category_id"]
        hash((image, category))  # a list is no id
        left, top, width, height = map(float, annotation["bbox"])
        ignore, segmentation = bool(annotation.get("iscrowd", 0)), annotation.get("segmentation") or None
        return image, category, [left, top, left + width, top + height], ignore, segmentation
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: cannot read the annotation {str(annotation)[:100]}: {error!r}. Expected image_id, category_id "
            "and bbox, four numbers (left, top, width, height)."
        ) from error
