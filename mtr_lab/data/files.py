"""Files of a dataset: which are images, how they are named, and the lists that name them."""

import codecs
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mtr_lab.data.walk import LeftOut, entries_of, is_hidden, kind_of, printable
from mtr_lab.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Of image files, in lower case. Of several files with one name, the first in this order is the image."""
LOSSLESS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".pgm")
"""Of label maps."""


def is_image(name: str) -> bool:
    """Whether a file's ending is one of ``ENDINGS``, in any case."""
    return name.lower().endswith(ENDINGS)


def check_within(name: str, place: str) -> None:
    """Raise a ``UserError`` if a file's name leads out of the folder that it is relative to; ``place`` names it."""
    parts = re.split(r"[/\\]", name)
    if not name or "\0" in name or ".." in parts or not parts[0] or Path(name).is_absolute():
        raise UserError(
            f"{place}: the file name {printable(name)[:200]!r} leads out of the dataset's folder: expected a path "
            "below it."
        )


def check_unique(names: Iterable[str], place: object, kind: str = "image") -> None:
    """Raise a ``UserError`` if two names are of the same file, which would count twice; ``place`` has the names."""
    counts = Counter(map(posixpath.normpath, names))
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise UserError(f"{place} lists the {kind} {printable(repeated[0])!r} more than once. Keep one entry of it.")


class NamedFiles:
    """Files of a folder by their names without the ending.

    Args:
        folder: where they are; a name may lead into a subfolder.
        endings: those to look for, in lower case, the preferred one first.
    """

    def __init__(self, folder: Path, endings: Sequence[str]) -> None:
        self.folder, self._endings = folder, endings
        self._read: dict[str, dict[str, str]] = {}

    def names(self, left_out: LeftOut) -> list[str]:
        """The names of the folder's files, sorted as the files are; hidden files and second files are left out."""
        files = self._files("")
        taken = set(files.values())
        if file_stamp(self.folder) is not None:
            for entry in entries_of(self.folder):
                if is_hidden(entry.name):
                    if entry.name.lower().endswith(tuple(self._endings)):
                        left_out.add("hidden files", entry.name)
                elif entry.name not in taken:
                    left_out.add("other files and folders", entry.name)
        return sorted(files, key=files.__getitem__)

    def path(self, name: str) -> Path:
        """The file of this name, with the preferred ending if there is no file."""
        head, _, tail = name.rpartition("/")
        return self.folder / head / self._files(head).get(tail, f"{tail}{self._endings[0]}")

    def _files(self, subfolder: str) -> dict[str, str]:
        """Name -> file name, of the files in a subfolder."""
        if subfolder in self._read:
            return self._read[subfolder]
        folder = self.folder / subfolder
        files = self._read.setdefault(subfolder, {})
        if file_stamp(folder) is None:
            return files
        for entry in entries_of(folder):
            stem, ending = os.path.splitext(entry.name)
            if ending.lower() not in self._endings or is_hidden(entry.name) or kind_of(entry) in ("folder", "other"):
                continue
            if stem not in files or self._rank(ending) < self._rank(os.path.splitext(files[stem])[1]):
                files[stem] = entry.name
        return files

    def _rank(self, ending: str) -> int:
        return self._endings.index(ending.lower())


def file_stamp(path: Path | str) -> tuple[int, int] | None:
    """Size and modification time (ns) of a file; ``None`` if there is none."""
    try:
        status = os.stat(path)  # a Path of each of a million files would take as long again
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """The place (``FILE, line 3``) and the stripped text of every line of a list that is not blank.

    Text is UTF-8, or UTF-16 with a byte order mark. Other bytes are read as in file names, so that they match names
    with the same bytes.

    Raises:
        UserError: the file cannot be read, or is not text.
    """
    try:
        content = path.read_bytes()
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16") if wide else content.decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read the list {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the list {path} is not UTF-16, as its first bytes say: save it as UTF-8.") from error
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if "\0" in line:
            raise UserError(f"{path}, line {number} is not text, or not UTF-8: save the list as UTF-8.")
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def saved_as(name: str) -> str:
    """What to do about a name of a list that is not there, as the end of a message; empty if the name is UTF-8."""
    return "" if name == printable(name) else " The line is not UTF-8: save the list as UTF-8."
