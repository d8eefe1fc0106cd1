"""Labelled videos: files in class folders, or in a CSV list."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torchvision.datasets.folder import find_classes, make_dataset

from mtr_lab.data.video.decoding import VIDEOS, Choose, read_frames
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
    """

    def __init__(
        self,
        directory: Path,
        paths: Sequence[str],
        labels: Sequence[int],
        classes: Sequence[str] | None,
        location: Path,
    ) -> None:
        self._directory, self._paths, self._labels = directory, list(paths), list(labels)
        self.classes, self.location = classes, str(location)
        self.num_images: int | None = len(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def id(self, index: int) -> str:
        """The path below the directory."""
        return self._paths[index]

    def label(self, index: int) -> int:
        """The number of the class."""
        return self._labels[index]

    def fingerprint(self) -> str:
        """A hash of every file's class, path, size and time of change; reads no file.

        Raises:
            UserError: a listed file is not there.
        """
        digest = hashlib.blake2b(digest_size=16)
        for path, label in zip(self._paths, self._labels, strict=True):
            try:
                stat = (self._directory / path).stat()
            except OSError as error:
                raise UserError(f"{self.location} names {path}, which cannot be read: {error.strerror}.") from error
            digest.update(f"{label}\0{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def read(self, index: int, choose: Choose) -> tuple[Tensor, str]:
        """The chosen frames of a video, (n, 3, H, W) uint8, and the blake2b-128 hex digest of its file."""
        path = self._directory / self._paths[index]
        content = path.read_bytes() if path.is_file() else b""  # a folder of frames
        return read_frames(path, choose), hashlib.blake2b(content, digest_size=16).hexdigest()


def open_videos(root: Path, split: str) -> VideoFiles:
    """The videos of a split: those that ``root/split.csv`` lists, of ``root/split/``, or of ``root`` itself.

    Raises:
        UserError: none of them is there, a line of the list is wrong, or there are no videos.
    """
    listed = root / f"{split}.csv"
    if listed.is_file():
        return read_list(listed)
    for directory in (root / split, root):
        if directory.is_dir() and any(entry.is_dir() for entry in directory.iterdir()):
            break
    else:
        raise UserError(f"dataset.root={root} has neither {split}.csv nor class folders for {split!r}. {LAYOUT}")
    if directory == root and (root / "train").is_dir():
        raise UserError(f"dataset.root={root} has neither {split}.csv nor {split}/. {LAYOUT}")
    classes, numbers = find_classes(str(directory))
    samples = make_dataset(str(directory), numbers, extensions=VIDEOS, allow_empty=True)
    if not samples:
        raise UserError(f"no videos in the class folders of {directory}: expected files ending in {', '.join(VIDEOS)}.")
    paths = [Path(path).relative_to(directory).as_posix() for path, _ in samples]
    return VideoFiles(directory, paths, [label for _, label in samples], classes, directory)


def read_list(file: Path) -> VideoFiles:
    """The videos of a CSV list: lines ``PATH,CLASS`` or ``PATH CLASS``, a class by its name or by its number.

    Paths are relative to the list's folder. Empty lines and a first line ``path,…`` are left out.

    Raises:
        UserError: a line of another form, names and numbers mixed, or no line.
    """
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip() or (number == 1 and line.lower().startswith("path")):
            continue
        path, comma, name = (part.strip() for part in line.rpartition("," if "," in line else " "))
        if not path or not name or "," in path:
            raise UserError(f"{file}, line {number}: {line!r} is not PATH,CLASS with one comma or blank between them.")
        rows.append((path, name))
    if not rows:
        raise UserError(f"{file} lists no video: expected lines PATH,CLASS.")
    names = {name for _, name in rows}
    if all(name.isdecimal() for name in names):
        return VideoFiles(file.parent, [path for path, _ in rows], [int(name) for _, name in rows], None, file)
    classes = sorted(names)
    labels = [classes.index(name) for _, name in rows]
    return VideoFiles(file.parent, [path for path, _ in rows], labels, classes, file)
