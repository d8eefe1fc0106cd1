"""Labelled videos: files in class folders, or in a CSV list."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mtr_lab.data.files import check_unique, file_stamp, lines_of
from mtr_lab.data.video.decoding import VIDEOS, Choose, read_frames
from mtr_lab.data.walk import LeftOut, class_folders, entries_of, is_hidden, kind_of, printable
from mtr_lab.errors import UserError

LAYOUT = (
    "Expected DIR/val/<class>/<video>, and for training DIR/train/<class>/<video>; or lists, DIR/val.csv and "
    "DIR/train.csv with a line PATH,CLASS for each video."
)


class VideoFiles:
    """Labelled video files in random access; labels number the classes in sorted order.

    Args:
        directory: of the paths.
        paths: of the videos, relative to the directory; they are the ids.
        labels: the class of each.
        classes: the names of the classes; ``None`` if they have numbers alone.
        location: the folder or list, for messages.
        on_error: ``"skip"`` accepts that a file is missing.
    """

    def __init__(
        self,
        directory: Path,
        paths: Sequence[str],
        labels: Sequence[int],
        classes: Sequence[str] | None,
        location: Path,
        on_error: str = "fail",
    ) -> None:
        self._directory, self._paths, self._labels = directory, list(paths), list(labels)
        self.classes, self.location = classes, printable(str(location))
        self._on_error = on_error
        self.num_images: int | None = len(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def id(self, index: int) -> str:
        """The path below the directory."""
        return printable(self._paths[index])

    def label(self, index: int) -> int:
        """The number of the class."""
        return self._labels[index]

    def fingerprint(self) -> str:
        """A hash of every file's class, path, size and time of change; reads no file.

        Raises:
            UserError: a file is missing, and is not to be skipped.
        """
        digest = hashlib.blake2b(digest_size=16)
        for index, label in enumerate(self._labels):
            stamp = file_stamp(self._directory / self._paths[index])
            if stamp is None and self._on_error == "fail":
                raise UserError(
                    f"{self.location} names {self.id(index)}, which cannot be read. Correct it, or leave out and list "
                    "all such videos with dataset.on_error=skip."
                )
            size, time = stamp or (None, None)
            digest.update(f"{label}\0{self.id(index)}\0{size}\0{time}\n".encode())
        return digest.hexdigest()

    def read(self, index: int, choose: Choose) -> tuple[Tensor, str]:
        """The chosen frames of a video, (n, 3, H, W) uint8, and the blake2b-128 hex digest of its file."""
        path = self._directory / self._paths[index]
        content = path.read_bytes() if path.is_file() else b""  # a folder of frames
        return read_frames(path, choose), hashlib.blake2b(content, digest_size=16).hexdigest()


def open_videos(root: Path, split: str, on_error: str = "fail") -> VideoFiles:
    """The videos of a split: those that ``root/split.csv`` lists, of ``root/split/``, or of ``root`` itself.

    Hidden files and folders, and files that are not videos, are left out, and counted in a printed line.

    Raises:
        UserError: none of them is there, a line of the list is wrong, or there are no videos; a folder cannot be read,
            or a link is broken and ``on_error`` is ``"fail"``.
    """
    listed = root / f"{split}.csv"
    if listed.is_file():
        return read_list(listed, on_error)
    for directory in (root / split, root):
        if directory.is_dir() and _holds_folders(directory):
            break
    else:
        raise UserError(f"dataset.root={root} has neither {split}.csv nor class folders for {split!r}. {LAYOUT}")
    if directory == root and (root / "train").is_dir():
        raise UserError(f"dataset.root={root} has neither {split}.csv nor {split}/. {LAYOUT}")
    left_out = LeftOut(on_error)
    folders = class_folders(directory, VIDEOS, left_out)
    samples = [(path, label) for label, paths in enumerate(folders.values()) for path in paths]
    if not samples:
        raise UserError(f"no videos in the class folders of {directory}: expected files ending in {', '.join(VIDEOS)}.")
    left_out.report(printable(str(directory)))
    paths, labels = [path for path, _ in samples], [label for _, label in samples]
    return VideoFiles(directory, paths, labels, [printable(folder) for folder in folders], directory, on_error)


def _holds_folders(directory: Path) -> bool:
    return any(kind_of(entry) == "folder" and not is_hidden(entry.name) for entry in entries_of(directory))


def read_list(file: Path, on_error: str = "fail") -> VideoFiles:
    """The videos of a CSV list: lines ``PATH,CLASS`` or ``PATH CLASS``, a class by its name or by its number.

    Paths are relative to the list's folder. Empty lines and a first line ``path,…`` are left out.

    Raises:
        UserError: a line of another form, names and numbers mixed, or no line.
    """
    rows = []
    for place, line in lines_of(file):
        if place.endswith(" 1") and line.lower().startswith("path"):
            continue
        path, _, name = (part.strip() for part in line.rpartition("," if "," in line else " "))
        if not path or not name or "," in path:
            raise UserError(f"{place}: {line!r} is not PATH,CLASS with one comma or blank between them.")
        if name.isdecimal() and len(name) > 9:
            raise UserError(f"{place}: the class {name[:20]} is not the number of a class.")
        rows.append((path, name))
    if not rows:
        raise UserError(f"{file} lists no video: expected lines PATH,CLASS.")
    check_unique([path for path, _ in rows], file, "video")
    names = {name for _, name in rows}
    if all(name.isdecimal() for name in names):
        return VideoFiles(
            file.parent, [path for path, _ in rows], [int(name) for _, name in rows], None, file, on_error
        )
    classes = sorted(names)
    labels = [classes.index(name) for _, name in rows]
    return VideoFiles(file.parent, [path for path, _ in rows], labels, classes, file, on_error)
