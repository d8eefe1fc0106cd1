"""Walk through the folders of a dataset, whatever lies in them: links, hidden folders, files of other kinds."""

import os
import re
from collections import Counter
from pathlib import Path

from mtr_lab.errors import UserError

_OF_SYSTEMS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NAMED = 3  # of the files that are left out


def is_hidden(name: str) -> bool:
    """Whether a program or a system put the file or folder there: ``.ipynb_checkpoints``, ``._photo.jpg``."""
    return name.startswith(".") or name in _OF_SYSTEMS


def printable(name: str) -> str:
    """A name as a line of UTF-8 text: bytes that are not UTF-8, which Python reads as surrogates, become ``\\udce9``.

    Control characters, which could break or colour the line, become ``\\x0a``.
    """
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", name.encode(errors="backslashreplace").decode())


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
        return "link" if entry.is_symlink() and not os.path.exists(entry.path) else "other"
    except PermissionError as error:
        raise UserError(f"cannot read {entry.path}: {error.strerror}. Make the folder readable.") from error
    except OSError:  # a link to itself
        return "link"


def ancestors(folder: Path) -> tuple[tuple[int, int], ...]:
    """The identities of a folder and of all folders above it."""
    return tuple(map(identity, (folder, *folder.resolve().parents)))


def files_below(root: Path, folder: str, endings: tuple[str, ...], left_out: LeftOut) -> list[str]:
    """Paths below ``root`` of the files in ``root/folder`` and its subfolders, folder by folder, sorted.

    Links to folders are followed, except to a folder that the link is in. A link to nothing with one of the endings is
    a file that cannot be read.

    Args:
        root: the dataset's folder.
        folder: a path below it.
        endings: of the files, in lower case.
        left_out: counts the other files.

    Raises:
        UserError: a folder cannot be read, or a link is broken and ``left_out`` does not skip it.
    """
    files: dict[str, list[str]] = {}
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
            elif entry.name.lower().endswith(endings) and kind != "other":
                if hidden:
                    left_out.add("hidden files", path)
                else:
                    files.setdefault(folder, []).append(path)
            elif kind == "link":
                left_out.add_link(NOWHERE, path, root)
            elif not hidden:
                left_out.add("other files", path)
    return [path for folder in sorted(files) for path in files[folder]]


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


def class_folders(directory: Path, endings: tuple[str, ...], left_out: LeftOut) -> dict[str, list[str]]:
    """The class folders, sorted, with the paths of their files below ``directory``.

    A link to nothing is an empty class, if ``left_out`` skips it.

    Raises:
        UserError: see :func:`files_below`.
    """
    folders: dict[str, list[str]] = {}
    above = ancestors(directory)
    for entry in entries_of(directory):
        name, kind, hidden = entry.name, kind_of(entry), is_hidden(entry.name)
        if kind == "folder" and hidden:
            left_out.add("hidden folders", name)
        elif kind == "folder" and entry.is_symlink() and identity(Path(entry.path)) in above:
            left_out.add_link(UPWARDS, name, directory)
        elif kind == "folder":
            folders[name] = files_below(directory, name, endings, left_out)
        elif name.lower().endswith(endings) and not hidden:
            left_out.add("files beside the class folders", name)
        elif kind == "link":
            left_out.add_link(NOWHERE, name, directory)
            folders[name] = []
    return folders
