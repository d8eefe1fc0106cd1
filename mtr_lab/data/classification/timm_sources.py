"""Datasets opened by timm (WebDataset, TensorFlow datasets, torchvision datasets, Hugging Face streams)."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset, get_worker_info

from mtr_lab.data.classification.tables import TableSource, content_of, open_table
from mtr_lab.data.files import ENDINGS, file_stamp
from mtr_lab.errors import UserError, unknown
from mtr_lab.image_file import open_image, reason

TIMM_PREFIXES = ("hfds", "hfids", "tfds", "torch", "wds")
_WITH_COLUMNS = ("hfds", "hfids", "wds")
_BUFFERED = 2048
"""Samples from which a WebDataset in training draws the next one."""


def open_timm(
    source: str,
    root: str | None,
    split: str,
    *,
    training: bool,
    batch_size: int,
    seed: int,
    image_column: str | None = None,
    label_column: str | None = None,
) -> "TableSource | IndexedSource | StreamSource":
    """Open ``source``, e.g. ``hfds/ILSVRC/imagenet-1k`` or ``wds/imagenet``, by ``timm.data.create_dataset``.

    Args:
        source: ``hfds/`` is opened by the package datasets itself.
        root, split: of the dataset.
        training: whether a stream is shuffled.
        batch_size, seed: of a stream in training.
        image_column, label_column: names of a Hugging Face dataset's columns; of a WebDataset, the ending of images and
            the field of a sample's JSON. ``None``: see :func:`open_table`.

    Raises:
        UserError: the prefix is unknown, a package is missing, or the dataset cannot be opened.
    """
    prefix, separator, name = source.partition("/")
    if not separator or prefix not in TIMM_PREFIXES:
        raise unknown(
            "dataset.source", source, ["imagefolder", "imagenette", *(f"{known}/NAME" for known in TIMM_PREFIXES)]
        )
    if (image_column or label_column) and prefix not in _WITH_COLUMNS:
        raise UserError(f"dataset.source={source} has no columns: set dataset.image_column and label_column to null.")
    as_stored: dict[str, Any] = {"input_img_mode": "", "input_key": image_column, "target_key": label_column}
    try:
        if prefix == "hfds":
            return open_table(source, name, root, split, image_column, label_column)
        dataset: Any = create_dataset(
            source,
            root=root,
            split=split,
            is_training=training,
            batch_size=batch_size,
            seed=seed,
            **(as_stored if prefix in _WITH_COLUMNS else {}),
        )
    except UserError:
        raise
    except (ImportError, AssertionError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"cannot open dataset.source={source} (dataset.root={root}, split {split!r}): {str(error).rstrip('.')}. "
            "hfds/ and hfids/ need the package datasets, wds/ webdataset and tfds/ tensorflow-datasets; splits are "
            "named by dataset.train_split and dataset.test_split."
        ) from error
    if prefix == "wds" and hasattr(dataset.reader, "split_info"):
        return ShardSource(source, dataset, root, split)
    kind = StreamSource if isinstance(dataset, IterableDataset) else IndexedSource
    return kind(source, dataset, root, split)


class IndexedSource:
    """A dataset of torchvision: decoded images."""

    def __init__(self, location: str, dataset: Any, root: str | None, split: str) -> None:
        self.location = location
        self._dataset = dataset
        self._root, self._split = root, split
        if hasattr(dataset, "loader"):
            dataset.loader = _open_image  # torchvision's loses all but 8 bits
        self.classes = _class_names(dataset)
        self.num_images: int | None = len(dataset)

    def __len__(self) -> int:
        return len(self._dataset)

    def id(self, index: int) -> str:
        """The index."""
        return str(index)

    def holdout_key(self, index: int) -> str:
        """The index."""
        return str(index)

    def fingerprint(self) -> str:
        """A hash that changes with the data, see ``_fingerprint``."""
        return _fingerprint(self.location, self._root, self._split, self._dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The image, and the label."""
        return self._dataset[index]


def _open_image(path: str) -> Image.Image:
    return open_image(Path(path))


@dataclass(frozen=True)
class Unreadable:
    """A sample of a stream without an image or a label."""

    name: str
    reason: str


Sample = tuple[bytes | Image.Image, int] | Unreadable


class StreamSource:
    """An iterable dataset of timm: images in the order of the stream."""

    def __init__(self, location: str, dataset: Any, root: str | None, split: str) -> None:
        self.location = location
        self._dataset = dataset
        self._root, self._split = root, split
        self.classes = _class_names(dataset)
        self.num_images: int | None = len(dataset) or None
        self._epoch = 0

    def __iter__(self) -> Iterator[Sample]:
        # A shuffling stream draws its order from the number of the epoch.
        self._dataset.set_epoch(self._epoch)
        self._epoch += 1
        return self._samples()

    def _samples(self) -> Iterator[Sample]:
        reader: Any = getattr(self._dataset, "reader", None)
        if self.location.startswith("hfids/") and hasattr(reader, "_lazy_init"):
            from datasets import Image as Encoded

            reader._lazy_init()
            reader.ds = reader.ds.cast_column(reader.input_key, Encoded(decode=False))
        for image, label in self._dataset:
            try:
                yield (content_of(image) if image is None or isinstance(image, dict) else image), int(label)
            except (OSError, TypeError, ValueError) as error:
                yield Unreadable("", reason(error))

    def fingerprint(self) -> str:
        """A hash that changes with the data, see ``_fingerprint``."""
        return _fingerprint(self.location, self._root, self._split, self._dataset)

    def split_over(self, num_workers: int) -> None:
        """Tell the reader the number of worker processes that share the stream."""
        self._dataset.set_loader_cfg(num_workers=num_workers)


class ShardSource(StreamSource):
    """A WebDataset: the samples of its shards, opened by timm and not read by it.

    timm's reader leaves out samples that it cannot decode, and the rest of a damaged shard.
    """

    def _samples(self) -> Iterator[Sample]:
        import webdataset

        reader, worker = self._dataset.reader, get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        shards = [os.path.join(reader.root, file) for file in reader.split_info.filenames]
        opened, lost = list[str](), list[Unreadable]()

        def note(error: Exception) -> bool:
            """Note, once a shard, that the rest of it is lost; continue with the next one."""
            if opened:
                shard = os.path.basename(opened.pop())
                lost.append(Unreadable(shard, f"the rest of the shard cannot be read ({error.args[0]})"))
            return True

        def epoch(random: Random | None) -> Iterator[Mapping[str, Any]]:
            urls = random.sample(shards, len(shards)) if random else shards

            def locations() -> Iterator[dict[str, str]]:
                for url in urls[number::workers]:
                    opened[:] = [url]
                    yield {"url": url}

            stages = [locations, webdataset.tarfile_to_samples(handler=note)]
            if random:
                stages.append(webdataset.shuffle(_BUFFERED, initial=_BUFFERED, rng=random))
            yield from webdataset.DataPipeline(*stages)

        samples = epoch(None)
        if reader.is_training:
            random = Random(f"{reader.common_seed} {self._epoch}")  # the same shards for all workers, then divided
            batches = -(-reader.num_samples // (workers * reader.batch_size))
            repeated = chain.from_iterable(epoch(random) for _ in repeat(None) if shards[number::workers])
            samples = islice(repeated, batches * reader.batch_size)
        for sample in samples:
            yield from lost
            lost.clear()
            yield self._labelled(sample)
        yield from lost

    def _labelled(self, sample: Mapping[str, Any]) -> Sample:
        reader = self._dataset.reader
        name, field = str(sample["__key__"]), reader.target_key or reader.split_info.alt_label
        endings = [reader.input_key] if self._image_column else [ending[1:] for ending in ENDINGS]
        image = next((sample[ending] for ending in endings if ending in sample), None)
        if image is None:
            return Unreadable(name, f"it has no image of the endings {', '.join(endings)}")
        try:
            label = json.loads(sample["json"])[field] if field else sample["cls"]
            return image, int(label)
        except KeyError as error:
            return Unreadable(name, f"it has no label: {error.args[0]} is missing")
        except (ValueError, TypeError, RecursionError):
            return Unreadable(name, f"its label is not a number, in {field or 'cls'}")

    @property
    def _image_column(self) -> bool:
        return ";" not in self._dataset.reader.input_key  # timm's default lists endings


def _fingerprint(source: str, root: str | None, split: str, dataset: Any) -> str:
    """A hash of the source, the split, the number of images, and the data.

    The data are hashed by path, size and modification time of the files below ``root``. Changes of a stream from the
    network are not noticed.
    """
    parts: list[Any] = [source, split, len(dataset), None]
    if root is not None:
        directory = Path(os.path.expanduser(root))
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            parts.append((path.relative_to(directory).as_posix(), *(file_stamp(path) or ())))
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _class_names(dataset: Any) -> Sequence[str] | None:
    """Class names in label order, from timm's reader or torchvision's dataset; WordNet ids if it has them."""
    class_to_idx = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if class_to_idx:
        return [name for name, _ in sorted(class_to_idx.items(), key=lambda item: item[1])]
    return getattr(dataset, "wnids", None) or getattr(dataset, "classes", None)
