"""Images with annotations in files of their own, boxes or label maps: decoded, and what is wrong with them said."""

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
    """Images that can be read in any order, from files."""

    location: str
    classes: tuple[str, ...]

    def __len__(self) -> int: ...
    def id(self, index: int) -> str: ...
    def fingerprint(self) -> str: ...
    def path(self, index: int) -> Path: ...


Source = TypeVar("Source", bound=AnnotatedSource)


class AnnotatedImages(Dataset[Entry], ABC, Generic[Source]):
    """Entries of a source's images.

    Args:
        source: the images.
        normalise: mean and standard deviation of the three colours, to 1.
        on_error: ``"fail"`` or ``"skip"`` an image that cannot be decoded.
    """

    def __init__(self, source: Source, normalise: tuple[Sequence[float], Sequence[float]], on_error: str) -> None:
        self.source, self.normalise, self.on_error = source, normalise, on_error

    @abstractmethod
    def annotated(self, index: int, image: Tensor) -> dict[str, Any]:
        """What an entry has besides ``id`` and ``hash``, of an image (3, h, w) uint8.

        Raises:
            UserError: its annotation is wrong, or does not fit it.
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
        """(3, h, w) float32 of uint8."""
        mean, std = self.normalise
        return F.normalize(F.to_dtype(image, torch.float32, scale=True), list(mean), list(std))
