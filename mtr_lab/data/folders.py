"""Images in class folders: where they are, and how they are read."""

import hashlib
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock
from torchvision.datasets import ImageFolder, Imagenette
from torchvision.datasets.folder import is_image_file

from mtr_lab.errors import UserError

_LAYOUT = (
    "Expected DIR/val/<class>/<image> (with DIR/train/<class>/<image> beside it for training) or, to evaluate only, "
    "DIR/<class>/<image>; dataset=imagenette_sample is bundled and needs nothing."
)


def find_root(name: str, root: str | None, *, of_classes: bool = True) -> Path:
    """The directory that ``dataset.root`` means; ``pkg://package/path`` is a directory inside an installed package.

    Args:
        of_classes: whether it holds a folder a class, which messages then describe.

    Raises:
        UserError: no root is given, or there is no such directory.
    """
    if not root:
        more = (
            f" (for ImageNet-1k the environment variable IMAGENET_DIR does as well). {_LAYOUT} ImageNet-1k can also "
            "be read with dataset.source=hfds/ILSVRC/imagenet-1k dataset.classes=imagenet-1k "
            "dataset.test_split=validation."
        )
        text = f"dataset {name!r} needs a directory of images: set dataset.root=DIR"
        raise UserError(text + (more if of_classes else "."))
    if root.startswith("pkg://"):
        package, _, path = root.removeprefix("pkg://").partition("/")
        return Path(str(resources.files(package).joinpath(path)))
    directory = Path(root).expanduser().absolute()
    if not directory.is_dir():
        text = f"dataset {name!r}, dataset.root: {directory} is not a directory."
        raise UserError(f"{text} {_LAYOUT}" if of_classes else text)
    return directory


def find_imagenette(root: str | None, split: str) -> Path:
    """The directory of Imagenette's splits: ``root`` as released, or ``imagenette2`` in it, downloaded by torchvision.

    Args:
        root: a directory; empty, if it is to be downloaded into it. ``None``: ``mtr_lab`` in the user's cache.

    Raises:
        UserError: there is no such directory, or nothing in it and no way to download it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = find_root("imagenette", root) if root else cache / "mtr_lab"
    if (directory / split).is_dir():
        return directory
    unpacked = directory / "imagenette2"
    if not unpacked.is_dir() and directory.is_dir() and _holds_class_folders(directory):
        return directory  # class folders without splits, or something else, which whoever reads it will name
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / ".imagenette.lock"):
            if not unpacked.is_dir():
                with TemporaryDirectory(dir=directory) as unfinished:
                    Imagenette(unfinished, split="val", download=True)
                    (Path(unfinished) / unpacked.name).rename(unpacked)
    except (OSError, RuntimeError) as error:  # no network, no space; a file that is not what it should be
        raise UserError(
            f"dataset 'imagenette' is not in {directory} and cannot be downloaded ({error}): unpack imagenette2.tgz "
            "(https://github.com/fastai/imagenette) and set dataset.root=DIR to the directory with train and val in it."
        ) from error
    return unpacked


def evaluation_directory(root: Path, split: str) -> Path:
    """``root/split`` if it holds class folders, else ``root`` if that does.

    Raises:
        UserError: ``root`` holds splits, but not this one.
    """
    if _holds_class_folders(root / split):
        return root / split
    splits = sorted(entry.name for entry in root.iterdir() if _holds_class_folders(entry))
    if splits:
        raise UserError(
            f"dataset.test_split={split}: {root} has no class folders in {split!r}, but in {', '.join(splits)}. "
            f"Set dataset.test_split to the one to evaluate. {_LAYOUT}"
        )
    return root


def training_directory(root: Path, split: str) -> Path:
    """``root/split``, which has to hold class folders.

    Raises:
        UserError: it does not.
    """
    if not _holds_class_folders(root / split):
        raise UserError(
            f"training images are needed, and {root / split} holds no class folders. Set dataset.root to a directory "
            "with DIR/train/<class>/<image> and DIR/val/<class>/<image>, or dataset.train_split to its name for train."
        )
    return root / split


def _holds_class_folders(directory: Path) -> bool:
    """Whether it looks like a split: directories in it and no image, as a class folder would have."""
    if not directory.is_dir():
        return False
    entries = list(directory.iterdir())
    return any(entry.is_dir() for entry in entries) and not any(is_image_file(entry.name) for entry in entries)


class FolderSource:
    """The encoded images of ``directory/<class>/…``; labels are the classes' places in sorted order.

    An empty class folder is a class all the same: a split may lack images of one.

    Raises:
        UserError: no class folders, or no images in any.
    """

    def __init__(self, directory: Path) -> None:
        try:
            folder = ImageFolder(str(directory), allow_empty=True)
        except FileNotFoundError as error:
            raise UserError(f"dataset.root: no class folders in {directory}. {_LAYOUT}") from error
        if not folder.samples:
            raise UserError(f"dataset.root: no images in the class folders of {directory}. {_LAYOUT}")
        self.location = str(directory)
        self.classes: Sequence[str] | None = folder.classes
        self.ids = [Path(path).relative_to(directory).as_posix() for path, _ in folder.samples]
        self.num_images: int | None = len(self.ids)
        self._directory = directory
        self._labels = folder.targets

    def __len__(self) -> int:
        return len(self.ids)

    def id(self, index: int) -> str:
        """The path below the directory, with forward slashes on every system."""
        return self.ids[index]

    def holdout_key(self, index: int) -> str:
        """What decides whether an image is held out: its id."""
        return self.ids[index]

    def fingerprint(self) -> str:
        """A hash of every file's class, path, size and time of change; reads no file.

        A copy that keeps the times (``rsync -a``, ``cp -p``, ``tar``) is the same data, wherever it lies.
        """
        digest = hashlib.blake2b(digest_size=16)
        for id, label in zip(self.ids, self._labels, strict=True):
            stat = (self._directory / id).stat()
            digest.update(f"{label}\0{id}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def read(self, index: int) -> tuple[bytes, int]:
        """The file's bytes and the label."""
        return (self._directory / self.ids[index]).read_bytes(), self._labels[index]
