"""Datasets opened by timm's factory: random access with and without encoded bytes, and streams."""

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from timm.data import ImageDataset, IterableImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder

from mtr_lab.data import ImageDataModule, imagenet_classes
from mtr_lab.errors import UserError

Folders = Callable[..., Path]
Module = Callable[..., ImageDataModule]


def test_torchvision_dataset_through_timm(folders: Folders, module: Module) -> None:
    root = folders("val", b=2, a=1)
    data = module(source="torch/image_folder", root=str(root), model_classes=["b", "a"], num_classes=2)
    (batch,) = data.test_dataloader()
    assert data.num_images == 3
    assert list(batch["id"]) == ["0", "1", "2"]
    assert batch["label"].tolist() == [1, 0, 0]
    pixels = Image.open(root / "val/a/0.jpg").convert("RGB").tobytes()
    assert batch["hash"][0] == hashlib.blake2b(pixels, digest_size=16).hexdigest()


def test_reader_with_encoded_bytes_keeps_names_and_never_shows_a_neighbour(
    folders: Folders, module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map-style timm dataset like those of ``hfds/``, with a local reader."""
    root = folders(a=2, b=2)
    dataset = ImageDataset(str(root), reader=ReaderImageFolder(str(root)))
    monkeypatch.setattr("mtr_lab.data.classification.timm_sources.create_dataset", lambda *_, **__: dataset)
    data = module(source="hfds/pets", holdout=0.5)
    (batch,) = data.test_dataloader()
    assert list(batch["id"]) == ["a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg"]
    assert batch["hash"][2] == hashlib.blake2b((root / "b/0.jpg").read_bytes(), digest_size=16).hexdigest()
    assert data.class_names == ["a", "b"]
    (root / "a/1.jpg").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"a/1\.jpg of hfds/pets"):
        list(data.test_dataloader())
    (batch,) = module(source="hfds/pets", on_error="skip").test_dataloader()
    assert list(batch["id"]) == ["a/0.jpg", "b/0.jpg", "b/1.jpg"]
    assert batch["skipped"] == ["a/1.jpg"]


class Stream:
    """A timm reader of seven red images; it fails or ends after ``stop`` of them."""

    def __init__(self, stop: int = 7, error: Exception | None = None) -> None:
        self.stop = stop
        self.error = error
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for index in range(self.stop):
            yield Image.new("RGB", (20, 20), (index, 0, 0)), index % 3
        if self.error:
            raise self.error


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stream]:
    def install(**options: Any) -> Stream:
        reader = Stream(**options)
        dataset = IterableImageDataset("", reader=reader)
        monkeypatch.setattr("mtr_lab.data.classification.timm_sources.create_dataset", lambda *_, **__: dataset)
        return reader

    return install


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_is_evaluated_in_order(
    stream: Callable[..., Stream], module: Module, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    stream()
    names = {"classes": ["c", "a", "b"], "model_classes": ["a", "b", "c"]}
    data = module(source="wds/pets", num_workers=num_workers, num_classes=3, **names)
    batches = list(data.test_dataloader())
    assert data.num_images == 7
    assert [id for batch in batches for id in batch["id"]] == [str(index) for index in range(7)]
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [2, 0, 1, 2, 0, 1, 2]


def test_stream_trains_in_full_batches_and_knows_the_epoch(stream: Callable[..., Stream], module: Module) -> None:
    reader = stream()
    loader = module(source="wds/pets", num_classes=3).train_dataloader()
    assert [[len(batch["id"]) for batch in loader] for _ in range(3)] == [[4]] * 3
    assert reader.epochs == [0, 1, 2]


def test_calibration_images_of_a_stream_are_its_first(stream: Callable[..., Stream], module: Module) -> None:
    stream()
    data = module(source="wds/pets", num_classes=3)
    expected = data.normalise(torch.cat([batch["image"] for batch in data.test_dataloader()]))
    assert torch.equal(data.calibration_images(5), expected[:5])


def test_images_a_stream_leaves_out_are_noticed(stream: Callable[..., Stream], module: Module) -> None:
    stream(stop=5)
    with pytest.raises(UserError, match=r"wds/pets: its reader left it out"):
        list(module(source="wds/pets", num_classes=3).test_dataloader())
    batches = list(module(source="wds/pets", num_classes=3, on_error="skip").test_dataloader())
    assert sum(len(batch["id"]) for batch in batches) == 5
    assert sum(len(batch["skipped"]) for batch in batches) == 2


def test_stream_that_breaks_off(stream: Callable[..., Stream], module: Module) -> None:
    stream(stop=5, error=OSError("image file is truncated"))
    with pytest.raises(UserError, match=r"hfids/pets broke off at image 5: image file is truncated"):
        list(module(source="hfids/pets", num_classes=3, on_error="skip").test_dataloader())


def test_label_outside_the_classes(stream: Callable[..., Stream], module: Module) -> None:
    stream()
    with pytest.raises(UserError, match=r"label 2 of image 2 is outside the 2 classes"):
        list(module(source="wds/pets", num_classes=2).test_dataloader())


def test_stream_cannot_hold_out(stream: Callable[..., Stream], module: Module) -> None:
    stream()
    with pytest.raises(UserError, match=r"dataset\.holdout=0\.1.*hfds/"):
        module(source="wds/pets", num_classes=3, holdout=0.1)


def test_source_that_does_not_open(module: Module, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot open dataset\.source=torch/cifar10 .*not found"):
        module(source="torch/cifar10", root=str(tmp_path))


def test_webdataset_shard(module: Module, folders: Folders) -> None:
    pytest.importorskip("webdataset")
    root = folders(a=3)
    with tarfile.open(root / "val-0.tar", "w") as shard:
        for index in range(3):
            (root / "label").write_text(str(index * 100))
            shard.add(root / f"a/{index}.jpg", f"{index}.jpg")
            shard.add(root / "label", f"{index}.cls")
    data = module(
        source="wds/imagenet",
        root=str(root),
        test_split="val-0.tar|3",
        classes="imagenet-1k",
        model_classes=imagenet_classes(),
        num_classes=1000,
    )
    (batch,) = data.test_dataloader()
    assert batch["label"].tolist() == [0, 100, 200]
    before = data.fingerprint()
    assert data.fingerprint() == before
    (root / "val-0.tar").write_bytes((root / "val-0.tar").read_bytes() + bytes(512))
    assert data.fingerprint() != before


def test_hugging_face_dataset(
    module: Module, folders: Folders, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    root = folders("test", a=2, b=1)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    data = module(source=f"hfds/{root}", test_split="test", model_classes=["b", "a"], num_classes=2)
    (batch,) = data.test_dataloader()
    assert batch["label"].tolist() == [1, 1, 0]
    assert batch["hash"][0] == hashlib.blake2b((root / "test/a/0.jpg").read_bytes(), digest_size=16).hexdigest()

    def fingerprint() -> str:
        return module(source=f"hfds/{root}", test_split="test", model_classes=["b", "a"], num_classes=2).fingerprint()

    assert fingerprint() == data.fingerprint()
    (root / "test/a/0.jpg").write_bytes((root / "test/b/0.jpg").read_bytes())
    assert fingerprint() != data.fingerprint()
