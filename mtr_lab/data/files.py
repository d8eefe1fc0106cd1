"""Files of a dataset: which are images, how they are named, and the folders and lists that name them."""

import codecs
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from mtr_lab.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Of image files, in lower case. Of several files with one name, the first in this order is the image."""
LOSSLESS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".pgm")
"""Of label maps."""
_OF_SYSTEMS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
_NAMED = 3  # of the files that are left out


def is_image(name: str) -> bool:
    """Whether a file's ending is one of ``ENDINGS``, in any case."""
    return name.lower().endswith(ENDINGS)


def is_hidden(name: str) -> bool:
    """Whether a program or a system put the file or folder there: ``.ipynb_checkpoints``, ``._photo.jpg``."""
    return name.startswith(".") or name in _OF_SYSTEMS


def printable(name: str) -> str:
    """A name as UTF-8 text: bytes that are not UTF-8, which Python reads as surrogates, become ``\\udce9``."""
    return name.encode(errors="backslashreplace").decode()


def check_within(name: str, place: str) -> None:
    """Raise a ``UserError`` if a file's name leads out of the folder that it is relative to; ``place`` names it."""
    parts = re.split(r"[/\\]", name)
    if not name or "\0" in name or ".." in parts or not parts[0] or Path(name).is_absolute():
        raise UserError(
            f"{place}: the file name {printable(name)[:200]!r} leads out of the dataset's folder: expected a path "
            "below it."
        )


class LeftOut:
    """Counts what lies in a dataset's folders and is not part of the dataset.

    Args:
        on_error: ``"fail"`` stops at a link that is broken, ``"skip"`` leaves it out.
    """

    def __init__(self, on_error: str) -> None:
        self._on_error = on_error
        self._counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}

    def add(self, kind: str, name: str) -> None:
        """Count one, a path below the dataset's folder; ``kind`` is a plural."""
        self._counts[kind] += 1
        names = self._names.setdefault(kind, [])
        if len(names) < _NAMED:
            names.append(printable(name))

    def add_link(self, leads: str, name: str, folder: Path) -> None:
        """Count a broken link in ``folder``; ``leads`` is ``NOWHERE`` or ``UPWARDS``.

        Raises:
            UserError: with ``on_error="fail"``.
        """
        if self._on_error == "fail":
            raise UserError(
                f"the link {folder / name} leads {leads}. Remove it, or leave out and count such links with "
                "dataset.on_error=skip."
            )
        self.add(f"links that lead {leads}", name)

    def report(self, location: str) -> None:
        """Print one line if something is left out."""
        if self._counts:
            print(f"{location}: left out: {self}.")

    def __str__(self) -> str:
        """One line, empty if nothing is left out."""
        return "; ".join(
            f"{kind}: {count} ({', '.join(self._names[kind])}{', …' if count > _NAMED else ''})"
            for kind, count in sorted(self._counts.items())
        )


NOWHERE, UPWARDS = "to nothing", "back to a folder above"


def entries_of(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, sorted by name.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"cannot read the folder {folder}: {error.strerror}. Its images would be missing: make it readable, or "
            "move it out of the dataset."
        ) from error


def kind_of(entry: os.DirEntry[str]) -> str:
    """``"folder"``, ``"file"``, ``"link"`` to nothing, or ``"other"``: a pipe, a socket, a device. Links are followed.

    Raises:
        UserError: a link leads through a folder that cannot be read.
    """
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "link" if entry.is_symlink() else "other"
    except PermissionError as error:
        raise UserError(f"cannot read {entry.path}: {error.strerror}. Make the folder readable.") from error
    except OSError:  # a link to itself
        return "link"


def ancestors(folder: Path) -> tuple[tuple[int, int], ...]:
    """The identities of a folder and of all folders above it."""
    return tuple(map(identity, (folder, *folder.resolve().parents)))


def images_below(root: Path, folder: str, left_out: LeftOut) -> list[str]:
    """Paths below ``root`` of the images in ``root/folder`` and its subfolders, folder by folder, sorted.

    Links to folders are followed, except to a folder that the link is in.

    Raises:
        UserError: a folder cannot be read, or a link is broken and ``left_out`` does not skip it.
    """
    images: dict[str, list[str]] = {}
    pending = [(folder, ancestors(root))]
    while pending:
        folder, above = pending.pop()
        above = (*above, identity(root / folder))
        for entry in entries_of(root / folder):
            path, kind, hidden = f"{folder}/{entry.name}", kind_of(entry), is_hidden(entry.name)
            if kind == "folder":
                if hidden:
                    left_out.add("hidden folders", path)
                elif entry.is_symlink() and identity(Path(entry.path)) in above:
                    left_out.add_link(UPWARDS, path, root)
                else:
                    pending.append((path, above))
            elif is_image(entry.name) and kind != "other":  # a dead link is an image that cannot be read
                if hidden:
                    left_out.add("hidden files", path)
                else:
                    images.setdefault(folder, []).append(path)
            elif kind == "link":
                left_out.add_link(NOWHERE, path, root)
            elif not hidden:
                left_out.add("files that are not images", path)
    return [path for folder in sorted(images) for path in images[folder]]


def identity(folder: Path) -> tuple[int, int]:
    """Device and inode of a folder, links followed.

    Raises:
        UserError: it cannot be read.
    """
    try:
        status = folder.stat()
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}.") from error
    return status.st_dev, status.st_ino


class NamedFiles:
    """Files of a folder by their names without the ending.

    Args:
        folder: where they are; a name may lead into a subfolder.
        endings: those to look for, in lower case, the preferred one first.
    """

    def __init__(self, folder: Path, endings: Sequence[str]) -> None:
        self.folder, self._endings = folder, endings
        self._files = cache(self._read)

    def names(self, left_out: LeftOut) -> list[str]:
        """The names of the folder's files, sorted as the files are; hidden files and second files are left out."""
        files = self._files("")
        if self.folder.is_dir():
            for entry in entries_of(self.folder):
                if is_hidden(entry.name):
                    if entry.name.lower().endswith(tuple(self._endings)):
                        left_out.add("hidden files", entry.name)
                elif entry.name not in files.values():
                    left_out.add("files and folders that are not images of a new name", entry.name)
        return sorted(files, key=files.__getitem__)

    def path(self, name: str) -> Path:
        """The file of this name, with the preferred ending if there is no file."""
        head, _, tail = name.rpartition("/")
        return self.folder / head / self._files(head).get(tail, f"{tail}{self._endings[0]}")

    def _read(self, subfolder: str) -> dict[str, str]:
        folder = self.folder / subfolder
        files: dict[str, str] = {}
        if not folder.is_dir():
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


def file_stamp(path: Path) -> tuple[int, int] | None:
    """Size and modification time (ns) of a file; ``None`` if there is none."""
    try:
        status = path.stat()
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
