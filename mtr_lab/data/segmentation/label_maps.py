"""Read segmentation datasets in their released directory layouts: images and label maps."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtr_lab.data.files import ENDINGS, LOSSLESS, NamedFiles, check_unique, check_within, file_stamp, lines_of, saved_as
from mtr_lab.data.walk import LeftOut, printable
from mtr_lab.errors import UserError, unknown
from mtr_lab.image_file import open_image, reason
from mtr_lab.regular_file import read_regular

IGNORE = 255
"""Label, in all batches, of pixels that neither training nor evaluation counts."""


@dataclass(frozen=True)
class Layout:
    """A dataset's directories of images and label maps, and its numbering of classes."""

    images: str
    """Directory of the images, relative to the root; ``{split}`` is the name of the split."""
    labels: str
    """Directory of the label maps: for every image, a lossless image of the same name."""
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
        on_error: ``"skip"`` accepts that an image is missing.

    Raises:
        UserError: the layout is unknown, there are no images, or an image or a label map is missing.
    """

    def __init__(self, root: Path, split: str, layout: str, classes: Sequence[str], on_error: str = "fail") -> None:
        if layout not in LAYOUTS:
            raise unknown("dataset.layout", layout, LAYOUTS)
        self._layout, self.classes = LAYOUTS[layout], tuple(classes)
        images, labels = (root / folder.format(split=split) for folder in (self._layout.images, self._layout.labels))
        self._images, self._maps = NamedFiles(images, ENDINGS), NamedFiles(labels, LOSSLESS)
        self.location = printable(str(images))
        self.left_out = LeftOut("fail")
        if self._layout.listing is None:
            self._names = self._images.names(self.left_out)
        else:
            listing = root / self._layout.listing.format(split=split)
            if not listing.is_file():
                raise UserError(f"{listing} does not exist. {self._expected}")
            self._names = []
            for place, name in lines_of(listing):
                check_within(name, place)
                self._names.append(name)
            check_unique(self._names, listing)
        if not self._names:
            raise UserError(f"there are no images for the split {split!r} in {images}. {self._expected}")
        for name in self._names:
            needed = [self._maps.path(name), *([] if on_error == "skip" else [self._images.path(name)])]
            for path in needed:
                if file_stamp(path) is None:
                    raise UserError(
                        f"{path} is missing: every image needs a label map of its name. {self._expected}"
                        f"{saved_as(name)}"
                    )

    @property
    def _expected(self) -> str:
        parts = (f"DIR/{self._layout.images}/*.jpg", f"DIR/{self._layout.labels}/*.png")
        listing = "" if self._layout.listing is None else f" and DIR/{self._layout.listing}"
        return f"Expected {' with '.join(parts)}{listing} (dataset.root=DIR), or images and maps of other formats."

    def __len__(self) -> int:
        return len(self._names)

    def id(self, index: int) -> str:
        """The file name without its suffix."""
        return printable(self._names[index])

    def path(self, index: int) -> Path:
        return self._images.path(self._names[index])

    def fingerprint(self) -> str:
        """A hash of the classes, and of the names, sizes and modification times of all images and label maps."""
        digest = hashlib.blake2b(repr(self.classes).encode(), digest_size=16)
        for index in range(len(self)):
            stamps = [file_stamp(path) for path in (self.path(index), self._label_path(index))]
            digest.update(f"{self.id(index)}\0{stamps}\n".encode())
        return digest.hexdigest()

    def labels(self, index: int) -> np.ndarray:
        """The label map (H, W) uint8: classes from 0, and ``IGNORE``.

        Raises:
            UserError: the file cannot be decoded, has several channels, or has a label outside the classes.
        """
        path = self._label_path(index)
        try:
            with open_image(io.BytesIO(read_regular(path))) as image:
                values = np.asarray(image)
        except Exception as error:  # damaged bytes make Pillow raise anything from OSError to struct.error
            raise UserError(f"cannot decode the label map {path}: {reason(error)}. Replace it.") from error
        if values.ndim != 2:
            raise UserError(
                f"the label map {path} has {values.shape[-1]} channels: expected one channel of class indices. "
                "Convert colours to indices first."
            )
        if (values.astype(np.int64) != values).any():
            raise UserError(f"the label map {path} has values that are not whole numbers: expected class indices.")
        values = values.astype(np.int64)
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
        return self._maps.path(self._names[index])
