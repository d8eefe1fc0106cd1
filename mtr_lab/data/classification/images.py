"""Labelled images as a dataset: read, decode, preprocess, map labels."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from mtr_lab.data.classification.timm_sources import Sample, StreamSource, Unreadable
from mtr_lab.data.images import Entry, Remarks, Skipped, read_picture, undecodable
from mtr_lab.errors import UserError
from mtr_lab.image_file import reason


class ImageSource(Protocol):
    """Labelled images in random access."""

    location: str
    classes: Sequence[str] | None
    num_images: int | None

    def __len__(self) -> int: ...
    def id(self, index: int) -> str: ...
    def holdout_key(self, index: int) -> str: ...
    def fingerprint(self) -> str: ...
    def read(self, index: int) -> tuple[bytes | Image.Image, int]: ...


@dataclass(frozen=True)
class Preparation:
    """Turns decoded images into entries: preprocessing, label mapping, treatment of failures.

    Attributes:
        transform: decoded RGB image -> (3, H, W) tensor: float32 for training, uint8 for evaluation.
        label_map: index of the model output for each label; ``None``: labels are indices of outputs.
        num_classes: number of outputs; ``None``: unknown.
        on_error: ``"fail"`` or ``"skip"`` an image that cannot be decoded.
        exif: ``"apply"`` or ``"ignore"`` the EXIF orientation.
        remarks: on unusual images.
    """

    transform: Callable[[Image.Image], Tensor]
    label_map: Sequence[int] | None
    num_classes: int | None
    on_error: str
    exif: str = "apply"
    remarks: Remarks = field(default_factory=Remarks)

    def decode(self, content: bytes | Image.Image, id: str) -> tuple[Image.Image, str]:
        """The RGB image and its hash.

        Raises:
            Undecodable: the image cannot be decoded.
        """
        try:
            picture = read_picture(content)
        except Exception as error:  # damaged bytes make Pillow raise anything from OSError to struct.error
            raise Undecodable(reason(error)) from error
        self.remarks.print(picture, id)
        return picture.seen(self.exif), picture.hash

    def entry(self, id: str, pixels: Tensor, hash: str, label: int) -> Entry:
        """The entry of a transformed image (3, H, W)."""
        known = len(self.label_map) if self.label_map is not None else self.num_classes
        if known is not None and not 0 <= label < known:
            return UserError(
                f"label {label} of image {id} is outside the {known} classes: choose a split with labels, or weights "
                "trained on these classes."
            )
        output = self.label_map[label] if self.label_map is not None else label
        return {"image": pixels, "label": output, "id": id, "hash": hash}

    def failure(self, id: str, location: str, reason: str) -> Skipped | UserError:
        """See :func:`undecodable`."""
        return undecodable(id, location, reason, self.on_error)


class Undecodable(Exception):
    """The bytes of an image cannot be read or decoded."""


class Images(Dataset[Entry]):
    """Labelled images in random access; entries are dictionaries of ``image`` (3, H, W), ``label``, ``id``, ``hash``.

    ``hash`` is the blake2b-128 hex digest of the encoded file, or of the decoded pixels if the source decodes. The
    entry of an image that cannot be decoded is ``Skipped`` or a ``UserError``.
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
        """The image in RGB, its hash, and its label in the source.

        Raises:
            Undecodable: the image cannot be read or decoded.
        """
        try:
            content, label = self.source.read(index)
        except Exception as error:  # of the file system, or of a package that decodes
            raise Undecodable(reason(error)) from error
        return *self.prepare.decode(content, self.source.id(index)), label

    def failure(self, index: int, error: Undecodable) -> Skipped | UserError:
        """The entry for an image that cannot be decoded."""
        return self.prepare.failure(self.source.id(index), self.source.location, str(error))


class ImageStream(IterableDataset[Entry]):
    """Labelled images in the order of a stream; entries as in :class:`Images`, ``id`` is the index in the stream."""

    def __init__(self, source: StreamSource, prepare: Preparation, complete: bool) -> None:
        """``complete``: report images that the source leaves out; requires at most one worker."""
        self.source = source
        self.prepare = prepare
        self.complete = complete

    def __iter__(self) -> Iterator[Entry]:
        worker = get_worker_info()
        prefix = f"{worker.id}/" if worker is not None and worker.num_workers > 1 else ""
        index = -1
        try:
            for index, sample in enumerate(self.source):
                yield self._entry(f"{prefix}{index}", sample)
        except (OSError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # A generator that has raised is exhausted: the rest of the stream cannot be read.
            yield UserError(f"{self.source.location} broke off at image {prefix}{index + 1}: {error}.")
            return
        missing = (self.source.num_images or 0) - (index + 1)
        if self.complete:
            for number in range(1, missing + 1):
                which = f"(unknown, {number} of {missing})"
                yield self.prepare.failure(which, self.source.location, "its reader skipped it")

    def _entry(self, id: str, sample: Sample) -> Entry:
        if isinstance(sample, Unreadable):
            named = f"{id} ({sample.name})" if sample.name else id
            return self.prepare.failure(named, self.source.location, sample.reason)
        content, label = sample
        try:
            image, hash = self.prepare.decode(content, id)
        except Undecodable as error:
            return self.prepare.failure(id, self.source.location, str(error))
        return self.prepare.entry(id, self.prepare.transform(image), hash, label)
