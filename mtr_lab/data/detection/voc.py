"""Pascal VOC annotations: one XML file per image, one list of images per split."""

import codecs
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from mtr_lab.data.detection.objects import Objects, check_box, flag, number, stated_size
from mtr_lab.data.files import ENDINGS, NamedFiles, check_unique, check_within, file_stamp, lines_of, saved_as
from mtr_lab.data.walk import entries_of, kind_of, printable
from mtr_lab.errors import UserError, unknown
from mtr_lab.regular_file import read_regular

_LAYOUT = "Expected DIR/ImageSets/Main/<split>.txt, DIR/Annotations/<id>.xml and DIR/JPEGImages/<id>.jpg (or .png, …)."
_EDGES = ("xmin", "ymin", "xmax", "ymax")


class VocSource:
    """The images listed in ``ImageSets/Main/<split>.txt`` of ``root`` or of its first subdirectory with such lists.

    Edges of boxes are read unchanged, although Pascal VOC counts pixels from 1. Names and values are read without the
    blanks around them.

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
        self.location = printable(str(listing))
        self._images = NamedFiles(self._root / "JPEGImages", ENDINGS)
        self._annotations = NamedFiles(self._root / "Annotations", [".xml"])
        self._names = [self._listed(*line) for line in lines_of(listing)]
        if not self._names:
            raise UserError(f"{listing} lists no image. {_LAYOUT}")
        check_unique(self._names, listing)
        annotations = [read_annotation(self._annotations.path(name)) for name in self._names]
        self.classes = tuple(
            classes or sorted({object.name for annotation in annotations for object in annotation.objects})
        )
        self.degenerate = 0
        self._objects = []
        for name, annotation in zip(self._names, annotations, strict=True):
            rows, path = [], str(self._annotations.path(name))
            for object in annotation.objects:
                if object.name not in self.classes:
                    raise unknown(f"class in {path}:", object.name, self.classes)
                if check_box(object.box, path):
                    rows.append((object.box, self.classes.index(object.name), object.difficult))
            self.degenerate += len(annotation.objects) - len(rows)
            self._objects.append(Objects.of(rows, size=annotation.size))

    def _listed(self, place: str, line: str) -> str:
        """The name of the image that a line of the list names; lists of one class put -1, 0 or 1 behind it."""
        check_within(line, place)
        name, _, last = line.rpartition(" ")
        names = (line, name.strip()) if last in ("-1", "0", "1") else (line,)
        for name in names:
            if file_stamp(self._annotations.path(name)) is not None:
                return name
        if saved_as(line):
            raise UserError(f"{place} lists an image without an annotation, {printable(line)!r}.{saved_as(line)}")
        return names[-1]

    def __len__(self) -> int:
        return len(self._names)

    def id(self, index: int) -> str:
        """The name in the list."""
        return printable(self._names[index])

    def fingerprint(self) -> str:
        """A hash of every image's file size and modification time, and of its annotation."""
        digest = hashlib.blake2b(digest_size=16)
        for index, name in enumerate(self._names):
            digest.update(f"{self.id(index)}\0{file_stamp(self.path(index))}\n".encode())
            digest.update(read_regular(self._annotations.path(name)))
        return digest.hexdigest()

    def path(self, index: int) -> Path:
        return self._images.path(self._names[index])

    def objects(self, index: int) -> Objects:
        return self._objects[index]


def _voc_directory(root: Path) -> Path:
    folders = [root / entry.name for entry in entries_of(root) if kind_of(entry) == "folder"]
    candidates = [root, *folders]
    matching = [path for path in candidates if (path / "ImageSets" / "Main").is_dir()]
    if not matching:
        raise UserError(f"dataset.root: {root} does not have Pascal VOC's layout. {_LAYOUT}")
    return matching[0]


@dataclass(frozen=True)
class AnnotatedObject:
    """An object of an annotation; ``box`` is left, top, right, bottom."""

    name: str
    box: list[float]
    difficult: bool


@dataclass(frozen=True)
class Annotation:
    """What an annotation file says; ``size`` is the image's (height, width), if stated."""

    objects: list[AnnotatedObject]
    size: tuple[int, int] | None


def read_annotation(path: Path) -> Annotation:
    """Read an annotation file, in the encoding that it declares or in UTF-8.

    Raises:
        UserError: it cannot be read, is not XML, or an object has no name or no box.
    """
    try:
        tree = ElementTree.fromstring(_text(read_regular(path)))
    except OSError as error:
        raise UserError(f"cannot read the annotation {path}: {error.strerror}. {_LAYOUT}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"the annotation {path}, line {line} is not {error.encoding}: save it as UTF-8, or declare its encoding in "
            "the first line."
        ) from error
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise UserError(f"the annotation {path} is not valid XML: {error}. Replace the file.") from error
    for element in tree.iter():
        element.tag = element.tag.rpartition("}")[2]  # without its namespace
    objects: list[AnnotatedObject] = []
    for element in tree.iter("object"):
        place = f"the annotation {path}: object {len(objects)}"
        try:
            box = [number(element.findtext(f"bndbox/{edge}")) for edge in _EDGES]
        except (TypeError, ValueError) as error:
            raise UserError(f"{place} has no box of the four numbers {', '.join(_EDGES)}. Correct it.") from error
        name = (element.findtext("name") or "").strip()
        if not name:
            raise UserError(f"{place} has no name. Correct it.")
        try:
            difficult = flag(element.findtext("difficult") or "")
        except ValueError as error:
            raise UserError(f"{place}: difficult {error}. Correct it.") from error
        objects.append(AnnotatedObject(name, box, difficult))
    return Annotation(objects, stated_size(tree.findtext("size/height"), tree.findtext("size/width")))


def _text(content: bytes) -> str:
    """XML as text without its declaration: the parser knows few encodings.

    Raises:
        UnicodeDecodeError, LookupError, ValueError: the encoding is wrong or unknown.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    else:
        declared = re.match(rb"""(?:\xef\xbb\xbf)?\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["']""", content)
        encoding = declared[1].decode("ascii", "replace") if declared else "utf-8"
        if codecs.lookup(encoding).name == "utf-8":
            encoding = "utf-8-sig"
    return re.sub(r"^\s*<\?xml[^>]*\?>", "", content.decode(encoding))
