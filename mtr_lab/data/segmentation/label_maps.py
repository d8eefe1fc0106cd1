"""Read segmentation datasets in their released directory layouts: images and label maps."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mtr_lab.data.images import reason
from mtr_lab.errors import UserError, unknown

IGNORE = 255
"""Label, in all batches, of pixels that neither training nor evaluation counts."""


@dataclass(frozen=True)
class Layout:
    """A dataset's directories of images and label maps, and its numbering of classes."""

    images: str
    """Directory of the JPEGs, relative to the root; ``{split}`` is the name of the split."""
    labels: str
    """Directory of the label maps: for every image, a PNG of the same name."""
    listing: str | None
    """File with the names of a split's images; None: all images of the directory."""
    ignore: int
    """The label of pixels to ignore."""
    first: int = 0
    """The label of class 0."""


LAYOUTS = {
    "camvid": Layout("{split}/images", "{split}/labels", None, ignore=11),
    "ade20k": Layout("images/{split}", "annotations/{split}", None, ignore=0, first=1),
    "voc": Layout("JPEGImages", "SegmentationClass", "ImageSets/Segmentation/{split}.txt", ignore=255),
}


class LabelMapSource:
    """The images of one split, sorted by name or in the order of the list.

    Args:
        root: the dataset's directory.
        split: the name of the split.
        layout: a name in ``LAYOUTS``.
        classes: names in label order.

    Raises:
        UserError: the layout is unknown, there are no images, or an image or a label map is missing.
    """

    def __init__(self, root: Path, split: str, layout: str, classes: Sequence[str]) -> None:
        if layout not in LAYOUTS:
            raise unknown("dataset.layout", layout, LAYOUTS)
        self._layout, self.classes = LAYOUTS[layout], tuple(classes)
        images, self._labels = (
            root / folder.format(split=split) for folder in (self._layout.images, self._layout.labels)
        )
        self.location = str(images)
        if self._layout.listing is None:
            self._paths = sorted(images.glob("*.jpg"))
        else:
            listing = root / self._layout.listing.format(split=split)
            if not listing.is_file():
                raise UserError(f"{listing} does not exist. {self._expected}")
            self._paths = [images / f"{name}.jpg" for name in listing.read_text().split()]
        if not self._paths:
            raise UserError(f"there are no images *.jpg for the split {split!r} in {images}. {self._expected}")
        for path in itertools.chain(self._paths, map(self._label_path, range(len(self)))):
            if not path.is_file():
                raise UserError(f"{path} is missing: every image needs a label map of its name. {self._expected}")

    @property
    def _expected(self) -> str:
        parts = (f"DIR/{self._layout.images}/*.jpg", f"DIR/{self._layout.labels}/*.png")
        listing = "" if self._layout.listing is None else f" and DIR/{self._layout.listing}"
        return f"Expected {' with '.join(parts)}{listing} (dataset.root=DIR)."

    def __len__(self) -> int:
        return len(self._paths)

    def id(self, index: int) -> str:
        """The file name without its suffix."""
        return self._paths[index].stem

    def path(self, index: int) -> Path:
        return self._paths[index]

    def fingerprint(self) -> str:
        """A hash of the classes, and of the names, sizes and modification times of all images and label maps."""
        digest = hashlib.blake2b(repr(self.classes).encode(), digest_size=16)
        for index in range(len(self)):
            stats = [path.stat() for path in (self.path(index), self._label_path(index))]
            digest.update(f"{self.id(index)}\0{[(stat.st_size, stat.st_mtime_ns) for stat in stats]}\n".encode())
        return digest.hexdigest()

    def labels(self, index: int) -> np.ndarray:
        """The label map (H, W) uint8: classes from 0, and ``IGNORE``.

        Raises:
            UserError: the file cannot be decoded, has several channels, or has a label outside the classes.
        """
        path = self._label_path(index)
        try:
            with Image.open(path) as image:
                values = np.asarray(image).astype(np.int64)
        except Exception as error:  # damaged bytes make Pillow raise anything from OSError to struct.error
            raise UserError(f"cannot decode the label map {path}: {reason(error)}. Replace it.") from error
        if values.ndim != 2:
            raise UserError(
                f"the label map {path} has {values.shape[-1]} channels: expected one channel of class indices. "
                "Convert colours to indices first."
            )
        labels, ignored = values - self._layout.first, values == self._layout.ignore
        wrong = ~ignored & ((labels < 0) | (labels >= len(self.classes)))
        if wrong.any():
            last = self._layout.first + len(self.classes) - 1
            raise UserError(
                f"the label map {path} has the label {values[wrong][0]}: expected {self._layout.first} to {last}, or "
                f"{self._layout.ignore} to ignore. Choose the dataset.layout and dataset.classes of these labels."
            )
        return np.where(ignored, IGNORE, labels).astype(np.uint8)

    def _label_path(self, index: int) -> Path:
        return self._labels / f"{self._paths[index].stem}.png"
