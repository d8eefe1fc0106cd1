"""A dataset of images whose annotations, boxes or label maps, lie in separate files."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from mtr_lab.data.images import Entry, decode, reason, undecodable
from mtr_lab.errors import UserError


class AnnotatedSource(Protocol):
    """Image files of one split with their annotations, in random access."""

    location: str
    classes: tuple[str, ...]

    def __len__(self) -> int: ...
    def id(self, index: int) -> str: ...
    def fingerprint(self) -> str: ...
    def path(self, index: int) -> Path: ...


Source = TypeVar("Source", bound=AnnotatedSource)


class AnnotatedImages(Dataset[Entry], ABC, Generic[Source]):
    """Entries of a source: a dictionary with ``id`` and ``hash``, ``Skipped``, or the ``UserError`` of the image.

    Args:
        source: the images and their annotations.
        normalise: mean and standard deviation of the three channels, of values from 0 to 1.
        on_error: ``"fail"`` or ``"skip"`` an image that cannot be decoded.
    """

    def __init__(self, source: Source, normalise: tuple[Sequence[float], Sequence[float]], on_error: str) -> None:
        self.source, self.normalise, self.on_error = source, normalise, on_error

    @abstractmethod
    def annotated(self, index: int, image: Tensor) -> dict[str, Any]:
        """The entry of an image (3, h, w) uint8, without ``id`` and ``hash``.

        Raises:
            UserError: the annotation is wrong, or does not fit the image.
        """

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Entry:
        id = self.source.id(index)
        try:
            decoded, hash = decode(self.source.path(index).read_bytes())
        except Exception as error:  # damaged bytes make Pillow raise anything from OSError to struct.error
            return undecodable(id, self.source.location, reason(error), self.on_error)
        try:
            return {**self.annotated(index, F.pil_to_tensor(decoded)), "id": id, "hash": hash}
        except UserError as error:
            return error

    def normalised(self, image: Tensor) -> Tensor:
        """The image (3, h, w), uint8 -> float32."""
        mean, std = self.normalise
        return F.normalize(F.to_dtype(image, torch.float32, scale=True), list(mean), list(std))
