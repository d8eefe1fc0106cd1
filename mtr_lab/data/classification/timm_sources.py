"""Datasets opened by timm: Hugging Face datasets, WebDataset, TensorFlow datasets, torchvision datasets."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset

from mtr_lab.errors import UserError, unknown

TIMM_PREFIXES = ("hfds", "hfids", "tfds", "torch", "wds")


def open_timm(
    source: str, root: str | None, split: str, *, training: bool, batch_size: int, seed: int
) -> "IndexedSource | StreamSource":
    """Open ``source``, e.g. ``hfds/ILSVRC/imagenet-1k`` or ``wds/imagenet``, by ``timm.data.create_dataset``.

    Raises:
        UserError: the prefix is unknown, a package is missing, or the dataset cannot be opened.
    """
    prefix, separator, _ = source.partition("/")
    if not separator or prefix not in TIMM_PREFIXES:
        raise unknown(
            "dataset.source", source, ["imagefolder", "imagenette", *(f"{known}/NAME" for known in TIMM_PREFIXES)]
        )
    try:
        dataset = create_dataset(source, root=root, split=split, is_training=training, batch_size=batch_size, seed=seed)
    except (ImportError, AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"cannot open dataset.source={source} (dataset.root={root}, split {split!r}): {str(error).rstrip('.')}. "
            "hfds/ and hfids/ need the package datasets, wds/ webdataset and tfds/ tensorflow-datasets; splits are "
            "named by dataset.train_split and dataset.test_split."
        ) from error
    kind = StreamSource if isinstance(dataset, IterableDataset) else IndexedSource
    return kind(source, dataset, root, split)


class IndexedSource:
    """A map-style dataset of timm: encoded bytes if its reader provides them, else decoded images."""

    def __init__(self, location: str, dataset: Any, root: str | None, split: str) -> None:
        self.location = location
        self._dataset = dataset
        self._root, self._split = root, split
        # timm's __getitem__ silently replaces an image that it cannot decode by the next one; its reader does not.
        self._reader = getattr(dataset, "reader", None)
        self.classes = _class_names(dataset)
        self.num_images: int | None = len(dataset)

    def __len__(self) -> int:
        return len(self._dataset)

    def id(self, index: int) -> str:
        """The file name if the reader provides it, else the index."""
        return str(self._reader.filename(index) or index) if self._reader is not None else str(index)

    def holdout_key(self, index: int) -> str:
        """The index: asking the reader for file names may read every image."""
        return str(index)

    def fingerprint(self) -> str:
        """A hash that changes with the data, see ``_fingerprint``."""
        return _fingerprint(self.location, self._root, self._split, self._dataset)

    def read(self, index: int) -> tuple[bytes | Image.Image, int]:
        """The encoded bytes or the decoded image, and the label."""
        if self._reader is None:
            return self._dataset[index]
        file, label = self._reader[index]
        with file:
            return file.read(), label


class StreamSource:
    """An iterable dataset of timm: decoded images in the order of the stream."""

    def __init__(self, location: str, dataset: Any, root: str | None, split: str) -> None:
        self.location = location
        self._dataset = dataset
        self._root, self._split = root, split
        self.classes = _class_names(dataset)
        self.num_images: int | None = len(dataset) or None
        self._epoch = 0

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        # A shuffling stream draws its order from the number of the epoch.
        self._dataset.set_epoch(self._epoch)
        self._epoch += 1
        return iter(self._dataset)

    def fingerprint(self) -> str:
        """A hash that changes with the data, see ``_fingerprint``."""
        return _fingerprint(self.location, self._root, self._split, self._dataset)

    def split_over(self, num_workers: int) -> None:
        """Tell the reader the number of worker processes that share the stream."""
        self._dataset.set_loader_cfg(num_workers=num_workers)


def _fingerprint(source: str, root: str | None, split: str, dataset: Any) -> str:
    """A hash of the source, the split, the number of images, and the data.

    The data are hashed by the fingerprint of a Hugging Face dataset, or else by path, size and modification time of the
    files below ``root``. Changes of a stream from the network, which has neither, are not noticed.
    """
    inner = getattr(getattr(dataset, "reader", None), "dataset", None)
    parts: list[Any] = [source, split, len(dataset), getattr(inner, "_fingerprint", None)]
    if root is not None and parts[-1] is None:
        directory = Path(root).expanduser()
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            parts.append((path.relative_to(directory).as_posix(), path.stat().st_size, path.stat().st_mtime_ns))
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _class_names(dataset: Any) -> Sequence[str] | None:
    """Class names in label order, from timm's reader or torchvision's dataset; WordNet ids if it has them."""
    class_to_idx = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if class_to_idx:
        return [name for name, _ in sorted(class_to_idx.items(), key=lambda item: item[1])]
    return getattr(dataset, "wnids", None) or getattr(dataset, "classes", None)
