"""A dataset of images whose annotations, boxes or label maps, lie in separate files."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from mtr_lab.data.images import Entry, Remarks, read_picture, undecodable
from mtr_lab.data.orientation import Orientation
from mtr_lab.errors import UserError
from mtr_lab.image_file import reason
from mtr_lab.regular_file import read_regular


class AnnotatedSource(Protocol):
    """Image files of one split with their annotations, in random access."""

    location: str
    classes: tuple[str, ...]

    def __len__(self) -> int: ...
    def id(self, index: int) -> str: ...
    def fingerprint(self) -> str: ...
    def path(self, index: int) -> Path: ...


@dataclass(frozen=True)
class Reading:
    """How images are read.

    Attributes:
        on_error: ``"fail"`` or ``"skip"`` an image that cannot be decoded.
        exif: ``"apply"`` or ``"ignore"`` the EXIF orientation.
        remarks: on unusual images.
    """

    on_error: str
    exif: str
    remarks: Remarks


Source = TypeVar("Source", bound=AnnotatedSource)


class AnnotatedImages(Dataset[Entry], ABC, Generic[Source]):
    """Entries of a source: a dictionary with ``id`` and ``hash``, ``Skipped``, or the ``UserError`` of the image.

    Args:
        source: the images and their annotations.
        normalise: mean and standard deviation of the three channels, of values from 0 to 1.
        reading: how to read images.
    """

    def __init__(self, source: Source, normalise: tuple[Sequence[float], Sequence[float]], reading: "Reading") -> None:
        self.source, self.normalise, self.reading = source, normalise, reading

    @abstractmethod
    def annotated(self, index: int, image: Tensor, orientation: Orientation) -> dict[str, Any]:
        """The entry of an image (3, h, w) uint8, without ``id`` and ``hash``.

        Raises:
            UserError: the annotation is wrong, or does not fit the image.
        """

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Entry:
        id = self.source.id(index)
        try:
            picture = read_picture(read_regular(self.source.path(index)))
        except Exception as error:  # damaged bytes make Pillow raise anything from OSError to struct.error
            return undecodable(id, self.source.location, reason(error), self.reading.on_error)
        self.reading.remarks.print(picture, id)
        image = F.pil_to_tensor(picture.seen(self.reading.exif))
        orientation = Orientation(picture.orientation, applied=self.reading.exif == "apply")
        try:
            return {**self.annotated(index, image, orientation), "id": id, "hash": picture.hash}
        except UserError as error:
            return error

    def normalised(self, image: Tensor) -> Tensor:
        """The image (3, h, w), uint8 -> float32."""
        mean, std = self.normalise
        return F.normalize(F.to_dtype(image, torch.float32, scale=True), list(mean), list(std))
