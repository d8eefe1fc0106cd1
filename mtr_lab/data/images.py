"""Reading a source's images: decoding, hashing, preprocessing, and what happens to images that fail."""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from mtr_lab.data.classification.timm_sources import StreamSource
from mtr_lab.errors import UserError


class ImageSource(Protocol):
    """Images that can be read in any order."""

    location: str
    classes: Sequence[str] | None
    num_images: int | None

    def __len__(self) -> int: ...
    def id(self, index: int) -> str: ...
    def holdout_key(self, index: int) -> str: ...
    def fingerprint(self) -> str: ...
    def read(self, index: int) -> tuple[bytes | Image.Image, int]: ...


@dataclass(frozen=True)
class Skipped:
    """An image that could not be decoded, where the user allowed it."""

    id: str


# A UserError is an entry and not raised: a DataLoader worker would bury its message in a traceback.
Entry: TypeAlias = dict[str, Any] | Skipped | UserError


@dataclass(frozen=True)
class Preparation:
    """What is done to every image of a dataset: preprocessing, label mapping, the rule for failures.

    Attributes:
        transform: decoded RGB image -> (3, H, W) tensor: float32 for training, uint8 for evaluation.
        label_map: model output of each label; ``None``: labels are outputs.
        num_classes: how many outputs there are; ``None``: not known.
        on_error: ``"fail"`` or ``"skip"`` an image that cannot be decoded.
    """

    transform: Callable[[Image.Image], Tensor]
    label_map: Sequence[int] | None
    num_classes: int | None
    on_error: str

    def entry(self, id: str, pixels: Tensor, hash: str, label: int) -> Entry:
        """One entry of a batch, of an image that has been transformed."""
        known = len(self.label_map) if self.label_map is not None else self.num_classes
        if known is not None and not 0 <= label < known:
            return UserError(
                f"label {label} of image {id} is outside the {known} classes: choose a split with labels, or weights "
                "trained on these classes."
            )
        output = self.label_map[label] if self.label_map is not None else label
        return {"image": pixels, "label": output, "id": id, "hash": hash}

    def failure(self, id: str, location: str, reason: str) -> Skipped | UserError:
        """As :func:`undecodable`."""
        return undecodable(id, location, reason, self.on_error)


class Undecodable(Exception):
    """The bytes of an image cannot be read, or are none of an image."""


class Images(Dataset[Entry]):
    """Images read in any order; entries are dictionaries of ``image`` (3, H, W), ``label``, ``id`` and ``hash``.

    ``hash`` is the blake2b-128 hex digest of the encoded file, or of the decoded pixels where the source only gives
    those. An image that cannot be decoded is an entry of its own: ``Skipped`` or a ``UserError``.
    """

    def __init__(self, source: ImageSource, prepare: Preparation) -> None:
        self.source = source
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Entry:
        try:
            image, hash, label = self.read(index)
        except Undecodable as error:
            return self.failure(index, error)
        return self.prepare.entry(self.source.id(index), self.prepare.transform(image), hash, label)

    def read(self, index: int) -> tuple[Image.Image, str, int]:
        """The image in RGB, the hash and the source's own label.

        Raises:
            Undecodable: there is no image to be had.
        """
        try:
            content, label = self.source.read(index)
            return *decode(content), label
        except Exception as error:  # damaged bytes make Pillow raise anything from OSError to struct.error
            raise Undecodable(reason(error)) from error

    def failure(self, index: int, error: Undecodable) -> Skipped | UserError:
        """The entry for an image that cannot be decoded."""
        return self.prepare.failure(self.source.id(index), self.source.location, str(error))


class ImageStream(IterableDataset[Entry]):
    """Images in the order of a stream; entries as in :class:`Images`, ``id`` the running index."""

    def __init__(self, source: StreamSource, prepare: Preparation, complete: bool) -> None:
        """``complete``: one pass has to yield every image of the source, by one worker at most."""
        self.source = source
        self.prepare = prepare
        self.complete = complete

    def __iter__(self) -> Iterator[Entry]:
        worker = get_worker_info()
        prefix = f"{worker.id}/" if worker is not None and worker.num_workers > 1 else ""
        index = -1
        try:
            for index, (content, label) in enumerate(self.source):
                image, hash = decode(content)
                yield self.prepare.entry(f"{prefix}{index}", self.prepare.transform(image), hash, label)
        except OSError as error:
            # The reader's generator is dead after it raised, so the rest of the stream is out of reach.
            yield UserError(f"{self.source.location} broke off at image {prefix}{index + 1}: {error}.")
            return
        missing = (self.source.num_images or 0) - (index + 1)
        if self.complete:
            # timm's WebDataset reader leaves out what it cannot decode and only logs it.
            for number in range(1, missing + 1):
                which = f"(unknown, {number} of {missing})"
                yield self.prepare.failure(which, self.source.location, "its reader left it out")


def undecodable(id: str, location: str, reason: str, on_error: str) -> Skipped | UserError:
    """The entry for an image of ``location`` (a directory, the name of a source) that cannot be decoded."""
    if on_error == "skip":
        return Skipped(id)
    return UserError(
        f"cannot decode image {id} of {location}: {reason}. Replace it, or leave out and list all such images with "
        "dataset.on_error=skip."
    )


def reason(error: Exception) -> str:
    """Why an image cannot be decoded; Pillow names the memory address of the buffer, which helps nobody."""
    return "no known image format" if isinstance(error, UnidentifiedImageError) else str(error)


def decode(content: bytes | Image.Image) -> tuple[Image.Image, str]:
    """The image in RGB, and the blake2b-128 hex digest of the encoded bytes, or of the pixels if there are none."""
    if isinstance(content, bytes):
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB"), hashlib.blake2b(content, digest_size=16).hexdigest()
    rgb = content.convert("RGB")
    return rgb, hashlib.blake2b(rgb.tobytes(), digest_size=16).hexdigest()
