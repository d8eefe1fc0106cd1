"""Cache of decoded, resized and cropped evaluation images in a memory-mapped file."""

import hashlib
import importlib.metadata
import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from mtr_lab.data.classification.images import Images, Undecodable
from mtr_lab.data.images import DECODING, Entry, Skipped
from mtr_lab.errors import UserError

PIXELS, INDEX = "pixels.u8", "index.npz"
_PACKAGES = ("pillow", "torchvision", "timm")
_CHUNK = 64  # images that a worker decodes per message


@dataclass(frozen=True)
class _Index:
    """What the cache stores of n images besides pixels; label and hash are valid where ``decoded`` is true."""

    decoded: np.ndarray  # (n,) bool
    labels: np.ndarray  # (n,) int64, the source's own
    hashes: np.ndarray  # (n,) str


class CachedImages(Dataset[Entry]):
    """The entries of ``images``, with pixels read from the cache ``folder/<key>/`` instead of decoded.

    Caches are keyed by content: the source's fingerprint (for a directory, the path, size and modification time of
    every file), the preprocessing, the treatment of the EXIF orientation, and the versions of the packages that decode
    and resize. Caches with other keys are ignored. The first process builds the cache with ``num_workers`` workers,
    other processes wait. The cache is renamed to its key once it is complete and synced to disk. A damaged cache is
    rebuilt. Images that could not be decoded are not cached, but tried again each time.

    Args:
        images: with a transform to uint8.
        shape: (3, H, W) of every image after the transform.
        folder: directory of the caches; an image takes 3·H·W bytes.
        name: the dataset's name in the progress bar.
        num_workers: number of processes that decode.

    Raises:
        UserError: an image cannot be decoded and ``on_error`` is ``"fail"``, or the folder cannot be written.
    """

    def __init__(self, images: Images, shape: tuple[int, int, int], folder: Path, name: str, num_workers: int) -> None:
        self._images = images
        self._shape = (len(images), *shape)
        self._folder = folder / _key(images, self._shape)
        self._pixels: np.ndarray | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f".{self._folder.name}.lock"):
                self._index = self._load() or self._build(name, num_workers)
        except OSError as error:
            size = np.prod(self._shape) / 2**30
            raise UserError(
                f"dataset.cache={folder}: cannot keep {len(images)} images ({size:.1f} GiB) there: {error.strerror}. "
                "Set another directory, or dataset.cache=null for no cache."
            ) from error

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Entry:
        if not self._index.decoded[index]:
            return self._images[index]
        if self._pixels is None:  # every worker opens the file itself
            self._pixels = np.memmap(self._folder / PIXELS, mode="c", shape=self._shape)
        id, hash, label = self._images.source.id(index), str(self._index.hashes[index]), int(self._index.labels[index])
        return self._images.prepare.entry(id, torch.from_numpy(self._pixels[index]), hash, label)

    def _load(self) -> _Index | None:
        """The index of the cache; ``None`` if there is no cache, or if it is damaged, which is printed."""
        if not self._folder.exists():
            return None
        try:
            with np.load(self._folder / INDEX, allow_pickle=False) as arrays:
                index = _Index(**arrays)
            size, expected = (self._folder / PIXELS).stat().st_size, np.prod(self._shape)
            if size != expected:
                raise ValueError(f"{PIXELS} has {size} bytes, not {expected}")
            if any(len(array) != len(self) for array in vars(index).values()):
                raise ValueError(f"{INDEX} does not have {len(self)} images")
        except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
            print(f"{self._folder}: the cache is damaged ({error}); rebuilding it.")
            return None
        return index

    def _build(self, name: str, num_workers: int) -> _Index:
        unfinished = self._folder.with_name(f".{self._folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # left behind by a process that died
        unfinished.mkdir()
        try:
            index = self._decode(unfinished, name, num_workers)
            shutil.rmtree(self._folder, ignore_errors=True)
            unfinished.rename(self._folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return index

    def _decode(self, folder: Path, name: str, num_workers: int) -> _Index:
        size = int(np.prod(self._shape))
        with open(folder / PIXELS, "wb") as file:
            if hasattr(os, "posix_fallocate"):  # on a full disk, an error here and no SIGBUS in a worker
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
        index = _Index(
            decoded=np.zeros(len(self), dtype=bool),
            labels=np.zeros(len(self), dtype=np.int64),
            hashes=np.zeros(len(self), dtype="U32"),
        )
        decoder = _Decoder(self._images, folder / PIXELS, self._shape)
        loader: DataLoader[Any] = DataLoader(decoder, batch_size=_CHUNK, num_workers=num_workers, collate_fn=list)
        label = f"decoding {name} into {self._folder.parent}"
        for start, batch in enumerate(track(loader, label, console=Console(stderr=True), disable=len(loader) < 2)):
            for i, entry in enumerate(batch, start * _CHUNK):
                if isinstance(entry, UserError):
                    raise entry
                if not isinstance(entry, Skipped):
                    index.labels[i], index.hashes[i] = entry
                    index.decoded[i] = True
        np.savez(folder / INDEX, **vars(index))
        for path in (folder / PIXELS, folder / INDEX):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        return index


class _Decoder(Dataset[tuple[int, str] | Skipped | UserError]):
    """Writes the pixels of an image to the mapped file and returns its label and hash."""

    def __init__(self, images: Images, file: Path, shape: tuple[int, ...]) -> None:
        self._images, self._file, self._shape = images, file, shape
        self._pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[int, str] | Skipped | UserError:
        if self._pixels is None:
            self._pixels = np.memmap(self._file, mode="r+", shape=self._shape)
        try:
            image, hash, label = self._images.read(index)
        except Undecodable as error:
            return self._images.failure(index, error)
        self._pixels[index] = self._images.prepare.transform(image).numpy()
        return label, hash


def _key(images: Images, shape: tuple[int, ...]) -> str:
    versions = [importlib.metadata.version(package) for package in _PACKAGES]
    parts = [
        images.source.fingerprint(),
        repr(images.prepare.transform),
        shape,
        versions,
        DECODING,
        images.prepare.exif,
    ]
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
