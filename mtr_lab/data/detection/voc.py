"""Pascal VOC annotations: one XML file per image, one list of images per split."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from mtr_lab.data.detection.objects import Objects, check_box
from mtr_lab.errors import UserError, unknown

_LAYOUT = "Expected DIR/ImageSets/Main/<split>.txt, DIR/Annotations/<id>.xml and DIR/JPEGImages/<id>.jpg."
_EDGES = ("xmin", "ymin", "xmax", "ymax")


class VocSource:
    """The images listed in ``ImageSets/Main/<split>.txt`` of ``root`` or of its first subdirectory with such lists.

    Edges of boxes are read unchanged, although Pascal VOC counts pixels from 1.

    Args:
        root: the dataset's directory.
        split: the name of a list.
        classes: names in label order; by default the classes of all objects, sorted.

    Raises:
        UserError: a file is missing or damaged, a class is not among ``classes``, or a box is invalid.
    """

    def __init__(self, root: Path, split: str, classes: Sequence[str] | None) -> None:
        self._root = _voc_directory(root)
        listing = self._root / "ImageSets" / "Main" / f"{split}.txt"
        if not listing.is_file():
            splits = ", ".join(sorted(path.stem for path in listing.parent.glob("*.txt"))) or "none"
            raise UserError(f"{listing} does not exist; the splits there: {splits}. {_LAYOUT}")
        self.location = str(listing)
        self._ids = [line.split()[0] for line in listing.read_text().splitlines() if line.strip()]
        if not self._ids:
            raise UserError(f"{listing} names no image. {_LAYOUT}")
        annotations = [_read(self._annotation(id)) for id in self._ids]
        self.classes = tuple(classes or sorted({name for objects in annotations for name, _, _ in objects}))
        self.degenerate = 0
        self._objects = []
        for id, objects in zip(self._ids, annotations, strict=True):
            rows = []
            for name, box, difficult in objects:
                if name not in self.classes:
                    raise unknown(f"class in {self._annotation(id)}:", name, self.classes)
                if check_box(box, str(self._annotation(id))):
                    rows.append((box, self.classes.index(name), difficult))
            self.degenerate += len(objects) - len(rows)
            self._objects.append(Objects.of(rows))

    def __len__(self) -> int:
        return len(self._ids)

    def id(self, index: int) -> str:
        """The name in the list."""
        return self._ids[index]

    def fingerprint(self) -> str:
        """A hash of every image's file size and modification time, and of its annotation."""
        digest = hashlib.blake2b(digest_size=16)
        for index, id in enumerate(self._ids):
            path = self.path(index)
            stat = path.stat() if path.is_file() else None
            digest.update(f"{id}\0{stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())
            digest.update(self._annotation(id).read_bytes())
        return digest.hexdigest()

    def path(self, index: int) -> Path:
        return self._root / "JPEGImages" / f"{self._ids[index]}.jpg"

    def objects(self, index: int) -> Objects:
        return self._objects[index]

    def _annotation(self, id: str) -> Path:
        return self._root / "Annotations" / f"{id}.xml"


def _voc_directory(root: Path) -> Path:
    candidates = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    matching = [path for path in candidates if (path / "ImageSets" / "Main").is_dir()]
    if not matching:
        raise UserError(f"dataset.root: {root} does not have Pascal VOC's layout. {_LAYOUT}")
    return matching[0]


def _read(path: Path) -> list[tuple[str, list[float], bool]]:
    """(name, box, difficult) of every object in an annotation."""
    try:
        tree = ElementTree.parse(path)
    except OSError as error:
        raise UserError(f"cannot read the annotation {path}: {error.strerror}. {_LAYOUT}") from error
    except ElementTree.ParseError as error:
        raise UserError(f"the annotation {path} is not valid XML: {error}. Replace the file.") from error
    objects: list[tuple[str, list[float], bool]] = []
    for element in tree.iter("object"):
        try:
            name, box = element.findtext("name"), [float(element.findtext(f"bndbox/{edge}")) for edge in _EDGES]  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the annotation {path}: object {len(objects)} has no box of the four numbers {', '.join(_EDGES)}. "
                "Correct it."
            ) from error
        if not name:
            raise UserError(f"the annotation {path}: object {len(objects)} has no name. Correct it.")
        objects.append((name, box, element.findtext("difficult") == "1"))
    return objects
