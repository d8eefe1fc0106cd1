"""Find dataset directories, and read images from class folders."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock
from torchvision.datasets import Imagenette

from mtr_lab.data.files import ENDINGS, file_stamp, is_image, lines_of, saved_as
from mtr_lab.data.walk import LeftOut, class_folders, entries_of, is_hidden, kind_of, printable
from mtr_lab.errors import UserError
from mtr_lab.regular_file import read_regular

_LAYOUT = (
    "Expected DIR/val/<class>/<image>, and for training DIR/train/<class>/<image>; for evaluation only, "
    "DIR/<class>/<image> is enough. dataset=imagenette_sample is bundled and needs no dataset.root."
)


def find_root(name: str, root: str | None, *, of_classes: bool = True) -> Path:
    """The directory of ``dataset.root``; ``pkg://package/path`` is a directory in an installed package.

    Args:
        name: the dataset's name in messages.
        root: the value of ``dataset.root``.
        of_classes: whether messages describe class folders.

    Raises:
        UserError: ``root`` is empty, or no directory.
    """
    if not root:
        more = (
            f" (for ImageNet-1k, the environment variable IMAGENET_DIR works, too). {_LAYOUT} ImageNet-1k can also "
            "be read with dataset.source=hfds/ILSVRC/imagenet-1k dataset.classes=imagenet-1k "
            "dataset.test_split=validation."
        )
        text = f"dataset {name!r} needs a directory of images: set dataset.root=DIR"
        raise UserError(text + (more if of_classes else "."))
    if root.startswith("pkg://"):
        package, _, path = root.removeprefix("pkg://").partition("/")
        spec = find_spec(package) if package.isidentifier() else None  # imports nothing
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"dataset {name!r}, dataset.root={root}: expected pkg://PACKAGE/PATH of a package.")
        return Path(spec.submodule_search_locations[0]) / path
    directory = Path(os.path.expanduser(root)).absolute()
    if not os.path.isdir(directory):  # a name that is too long has none either
        text = f"dataset {name!r}, dataset.root: {directory} is not a directory."
        raise UserError(f"{text} {_LAYOUT}" if of_classes else text)
    return directory


def find_imagenette(root: str | None, split: str) -> Path:
    """The directory of Imagenette's splits: ``root``, or ``root/imagenette2``, which torchvision downloads if missing.

    Args:
        root: a directory; ``None``: ``mtr_lab`` in the user's cache.
        split: the split to look for in ``root``.

    Raises:
        UserError: ``root`` is not a directory, or the download fails.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = find_root("imagenette", root) if root else cache / "mtr_lab"
    if (directory / split).is_dir():
        return directory
    unpacked = directory / "imagenette2"
    if not unpacked.is_dir() and directory.is_dir() and _holds_class_folders(directory):
        return directory  # class folders without splits, or another split: evaluation_directory tells them apart
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / ".imagenette.lock"):
            if not unpacked.is_dir():
                with TemporaryDirectory(dir=directory) as unfinished:
                    Imagenette(unfinished, split="val", download=True)
                    (Path(unfinished) / unpacked.name).rename(unpacked)
    except (OSError, RuntimeError) as error:  # no network, a full disk, a wrong checksum
        raise UserError(
            f"dataset 'imagenette' is not in {directory} and cannot be downloaded ({error}): unpack imagenette2.tgz "
            "(https://github.com/fastai/imagenette) and set dataset.root=DIR to the directory with train and val in it."
        ) from error
    return unpacked


def evaluation_directory(root: Path, split: str) -> Path:
    """``root/split`` if it holds folders, else ``root``.

    Raises:
        UserError: ``root`` holds other splits, or ``root/split`` holds images and is the only folder.
    """
    if _subfolders(root / split):
        return root / split
    folders = _subfolders(root)
    splits = [name for name in folders if _holds_class_folders(root / name)]
    if splits:
        raise UserError(
            f"dataset.test_split={split}: {root} has no class folders in {split!r}, but in {', '.join(splits)}. "
            f"Set dataset.test_split to one of these. {_LAYOUT}"
        )
    if folders == [split]:
        raise UserError(f"dataset.root: {root / split} holds images, but no class folders. {_LAYOUT}")
    return root


def training_directory(root: Path, split: str) -> Path:
    """``root/split``.

    Raises:
        UserError: it holds no class folders.
    """
    if not _subfolders(root / split):
        raise UserError(
            f"training needs images, and {root / split} holds no class folders. Set dataset.root to a directory with "
            "DIR/train/<class>/<image> and DIR/val/<class>/<image>, or dataset.train_split to the folder's name."
        )
    return root / split


def _subfolders(directory: Path) -> list[str]:
    """The names of the folders in a directory that are not hidden; none if there is no directory."""
    if not directory.is_dir():
        return []
    entries = entries_of(directory)
    return [printable(entry.name) for entry in entries if not is_hidden(entry.name) and kind_of(entry) == "folder"]


def _holds_class_folders(directory: Path) -> bool:
    """Whether a directory looks like a split: it has subdirectories and, unlike a class folder, no images."""
    return bool(_subfolders(directory)) and not any(
        is_image(entry.name) and not is_hidden(entry.name) for entry in entries_of(directory)
    )


class FolderSource:
    """The encoded images of ``directory/<class>/…``; labels number the classes in sorted order.

    An empty class folder counts as a class. Hidden files and folders, and files that are not images, are left out.

    Args:
        directory: holds the class folders.
        include: text file with the ids of the images to keep, one per line; ``None`` keeps all.
        exclude: text file with the ids of images to leave out.
        on_error: ``"fail"`` or ``"skip"`` links that lead to nothing or to a folder above.

    Attributes:
        classes: the names of the class folders.
        left_out: what else lies in the directory.

    Raises:
        UserError: the directory has no class folders, or no images; a folder cannot be read; a link is broken; a list
            is missing, or names an image that is not in the directory.
    """

    def __init__(
        self, directory: Path, include: Path | None = None, exclude: Path | None = None, on_error: str = "fail"
    ) -> None:
        self.left_out = LeftOut(on_error)
        folders = class_folders(directory, ENDINGS, self.left_out)
        if not folders:
            raise UserError(f"dataset.root: no class folders in {directory}. {_LAYOUT}")
        labels = {path: label for label, paths in enumerate(folders.values()) for path in paths}
        if not labels:
            left_out = f" Left out: {self.left_out}." if str(self.left_out) else ""
            raise UserError(f"dataset.root: no images in the class folders of {directory}.{left_out} {_LAYOUT}")
        self.location = printable(str(directory))
        self.classes: Sequence[str] | None = [printable(folder) for folder in folders]
        if include is not None:
            listed = _listed(include, "include", labels, directory)
            labels = {path: label for path, label in labels.items() if path in listed}
        if exclude is not None:
            listed = _listed(exclude, "exclude", labels, directory)
            labels = {path: label for path, label in labels.items() if path not in listed}
        if not labels:
            raise UserError(f"dataset.include and dataset.exclude leave no image of {directory}: change the lists.")
        self._paths = list(labels)
        self.num_images: int | None = len(self._paths)
        self._directory = directory
        self._labels = list(labels.values())

    def __len__(self) -> int:
        return len(self._paths)

    def id(self, index: int) -> str:
        """The path below the directory, with forward slashes on every system."""
        return printable(self._paths[index])

    def holdout_key(self, index: int) -> str:
        """The id."""
        return self.id(index)

    def fingerprint(self) -> str:
        """A hash of every file's class, path, size and time of change; reads no file.

        A copy that keeps the times (``rsync -a``, ``cp -p``, ``tar``) is the same data, wherever it lies.
        """
        digest = hashlib.blake2b(digest_size=16)
        for index, label in enumerate(self._labels):
            size, time = file_stamp(f"{self._directory}/{self._paths[index]}") or (None, None)
            digest.update(f"{label}\0{self.id(index)}\0{size}\0{time}\n".encode())
        return digest.hexdigest()

    def read(self, index: int) -> tuple[bytes, int]:
        """The file's bytes and the label."""
        return read_regular(self._directory / self._paths[index]), self._labels[index]


def _listed(file: Path, option: str, paths: Mapping[str, int], directory: Path) -> set[str]:
    """The paths in a list of images, one per line: as they are on disk, or as ids."""
    if not file.is_file():
        raise UserError(f"dataset.{option}={file} is not a file: give a text file with one <class>/<image> per line.")
    listed = [line for _, line in lines_of(file)]
    by_id = {} if all(line in paths for line in listed) else {printable(path): path for path in paths}
    missing = [line for line in listed if line not in paths and line not in by_id]
    if missing:
        raise UserError(
            f"dataset.{option}={file} lists {missing[0]!r}, one of {len(missing)} images that are not in {directory}: "
            f"its lines are paths below that directory, <class>/<image>.{saved_as(missing[0])}"
        )
    return {line if line in paths else by_id[line] for line in listed}
