"""Datasets opened by timm's factory: random access with and without encoded bytes, and streams."""

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IterableImageDataset, create_dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from mtr_lab.data import ImageDataModule, imagenet_classes
from mtr_lab.data.classification.images import ImageStream, Preparation
from mtr_lab.data.classification.timm_sources import StreamSource
from mtr_lab.data.images import Skipped
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
    with pytest.raises(UserError, match=r"wds/pets: its reader skipped it"):
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


def jpeg(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 20), (shade, 0, 0)).save(stream, "JPEG")
    return stream.getvalue()


def write_shard(path: Path, **files: bytes) -> None:
    """``write_shard(path, **{"0.jpg": b"…", "0.cls": b"3"})``."""
    with tarfile.open(path, "w") as shard:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))


def shard_of(**images: bytes) -> dict[str, bytes]:
    """The files of a shard: images of class 0, 1, 2 …"""
    files = {}
    for label, (name, content) in enumerate(images.items()):
        files |= {f"{name}.jpg": content, f"{name}.cls": str(label).encode()}
    return files


def test_a_webdataset_reports_what_it_cannot_read(module: Module, tmp_path: Path) -> None:
    """Without a count and without an info.json, too."""
    pytest.importorskip("webdataset")
    files = shard_of(a=jpeg(0), b=b"damaged", c=jpeg(2), d=jpeg(3))
    files["c.cls"] = b"cat"
    del files["d.jpg"]
    write_shard(tmp_path / "val-0.tar", **files, **{"e.json": b"{}"})
    write_shard(tmp_path / "val-1.tar", **shard_of(f=jpeg(0), g=jpeg(1)))
    whole = (tmp_path / "val-1.tar").read_bytes()
    (tmp_path / "val-1.tar").write_bytes(whole[: whole.index(b"g.jpg") + 600])
    options: dict[str, Any] = {"source": "wds/pets", "root": str(tmp_path), "num_classes": 4}
    options["test_split"] = "val-{0..1}.tar"
    with pytest.raises(UserError, match=r"cannot decode image 1 of wds/pets: no known image format.*on_error=skip"):
        list(module(**options).test_dataloader())
    batches = list(module(**options, on_error="skip").test_dataloader())
    assert [id for batch in batches for id in batch["id"]] == ["0", "6"]
    skipped = [name for batch in batches for name in batch["skipped"]]
    assert skipped == ["1", "2 (c)", "3 (d)", "4 (e)", "5 (val-1.tar)"]


def test_a_webdataset_trains_on_all_shards(module: Module, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    for number in range(3):
        write_shard(tmp_path / f"t-{number}.tar", **shard_of(a=jpeg(9 * number), b=jpeg(9 * number + 4)))
    write_shard(tmp_path / "val-0.tar", **shard_of(a=jpeg(0)))
    data = module(
        source="wds/pets",
        root=str(tmp_path),
        train_split="t-{0..2}.tar|6",
        test_split="val-0.tar|1",
        num_classes=2,
        batch_size=2,
    )
    loader = data.train_dataloader()
    orders = [[hash for batch in loader for hash in batch["hash"]] for _ in range(3)]
    assert [len(set(order)) for order in orders] == [6, 6, 6]
    assert len(set(map(tuple, orders))) > 1


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


Table = Callable[..., str]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    """Writes a Hugging Face dataset of one split, ``test``; columns are (feature, values)."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def write(**columns: tuple[Any, list[Any]]) -> str:
        features = datasets.Features({name: feature for name, (feature, _) in columns.items()})
        rows = {name: values for name, (_, values) in columns.items()}
        folder = tmp_path / "table"
        folder.mkdir()
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "test.parquet"))
        return f"hfds/{folder}"

    return write


def images(count: int) -> list[dict[str, Any] | None]:
    return [{"bytes": jpeg(20 * number), "path": None} for number in range(count)]


def test_columns_of_other_names(module: Module, table: Table) -> None:
    datasets = pytest.importorskip("datasets")
    fine, coarse = datasets.ClassLabel(names=["a", "b"]), datasets.ClassLabel(names=["x"])
    source = table(img=(datasets.Image(), images(2)), coarse_label=(coarse, [0, 0]), fine_label=(fine, [1, 0]))
    with pytest.raises(UserError, match=r"dataset\.label_column: .*one of coarse_label, fine_label"):
        module(source=source, test_split="test")
    with pytest.raises(UserError, match=r"unknown dataset\.image_column 'image'.*Available: .*img"):
        module(source=source, test_split="test", image_column="image")
    data = module(source=source, test_split="test", label_column="fine_label")
    (batch,) = data.test_dataloader()
    assert (data.class_names, batch["label"].tolist()) == (["a", "b"], [1, 0])
    assert batch["hash"][0] == hashlib.blake2b(jpeg(0), digest_size=16).hexdigest()
    other = module(source=source, test_split="test", label_column="coarse_label")
    assert other.fingerprint() != data.fingerprint()
    with pytest.raises(UserError, match=r"source=imagefolder has no columns"):
        module(source="imagefolder", label_column="fine_label")


def test_a_stream_of_hugging_face_is_decoded_here(table: Table) -> None:
    """With 16 bits, and every sample that cannot be read on its place."""
    datasets = pytest.importorskip("datasets")
    stream = io.BytesIO()
    Image.fromarray(np.full((9, 9), 25700, np.uint16)).save(stream, "PNG")
    cells: list[Any] = [{"bytes": content, "path": None} for content in (stream.getvalue(), b"damaged")]
    source = table(image=(datasets.Image(), [cells[0], None, cells[1]]), label=(datasets.Value("int64"), [1, 0, 1]))
    source = source.replace("hfds/", "hfids/")
    dataset = create_dataset(source, split="test", num_samples=3, input_img_mode="")  # of a folder, nothing states it
    prepare = Preparation(pil_to_tensor, None, 2, "skip")
    entries = list(ImageStream(StreamSource(source, dataset, None, "test"), prepare, complete=True))
    first: Any = entries[0]
    assert (first["label"], first["image"].unique().tolist()) == (1, [100])
    assert entries[1:] == [Skipped("1"), Skipped("2")]


def test_labels_that_are_texts_and_cells_that_are_null(module: Module, table: Table) -> None:
    datasets = pytest.importorskip("datasets")
    cells = images(4)
    cells[1] = None
    source = table(image=(datasets.Image(), cells), label=(datasets.Value("string"), ["cat", "cat", None, "ant"]))
    data = module(source=source, test_split="test", on_error="skip")
    (batch,) = data.test_dataloader()
    assert data.class_names == ["ant", "cat"]
    assert (batch["label"].tolist(), list(batch["id"])) == ([1, 0], ["0", "3"])
    assert batch["skipped"] == ["1", "2"]
    with pytest.raises(UserError, match=r"cannot decode image 1 of hfds/.*: its image is null.*on_error=skip"):
        list(module(source=source, test_split="test").test_dataloader())
