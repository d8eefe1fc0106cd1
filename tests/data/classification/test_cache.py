"""The cache of decoded images: it saves decoding, and is never used for other images or preprocessing."""

import multiprocessing
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtr_lab.data import ImageDataModule
from mtr_lab.data.classification import images
from mtr_lab.errors import UserError

Folders = Callable[..., Path]
Module = Callable[..., ImageDataModule]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the images that this process decodes."""
    counts: Counter[str] = Counter()
    read_picture = images.read_picture

    def counted(content):
        counts["images"] += 1
        return read_picture(content)

    monkeypatch.setattr(images, "read_picture", counted)
    return counts


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a["image"], b["image"])
        and torch.equal(a["label"], b["label"])
        and all(list(a[name]) == list(b[name]) for name in ("id", "hash", "skipped"))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_second_run_decodes_nothing_and_sees_the_same(
    folders: Folders, module: Module, tmp_path: Path, decoded: Counter[str], num_workers: int
) -> None:
    root = str(folders("val", a=40, b=33))
    without = list(module(root=root).test_dataloader())
    cache = {"root": root, "cache": str(tmp_path / "cache"), "num_workers": num_workers}
    assert same(list(module(**cache).test_dataloader()), without)
    decoded.clear()
    again = list(module(**{**cache, "num_workers": 0}).test_dataloader())
    assert decoded["images"] == 0
    assert same(again, without)


def test_labels_follow_the_model_and_not_the_cache(folders: Folders, module: Module, tmp_path: Path) -> None:
    root = folders("val", a=1, b=1)
    options: dict[str, Any] = {"root": str(root), "cache": str(tmp_path / "cache"), "num_classes": 3}
    for names in (["a", "b", "c"], ["c", "b", "a"]):
        (batch,) = module(**options, model_classes=names).test_dataloader()
        assert batch["label"].tolist() == [names.index("a"), names.index("b")]


def replace_image(root: Path, module: Module) -> None:
    image = root / "val" / "a" / "0.jpg"
    image.write_bytes((root / "val" / "b" / "0.jpg").read_bytes())


def add_image(root: Path, module: Module) -> None:
    (root / "val" / "b" / "9.jpg").write_bytes((root / "val" / "b" / "0.jpg").read_bytes())


@pytest.mark.parametrize("change", [replace_image, add_image])
def test_a_cache_of_other_images_is_not_looked_at(
    folders: Folders, module: Module, tmp_path: Path, change: Callable[..., None]
) -> None:
    root = folders("val", a=3, b=2)
    options = {"root": str(root), "cache": str(tmp_path / "cache")}
    before = list(module(**options).test_dataloader())
    change(root, module)
    after = list(module(**options).test_dataloader())
    assert same(after, list(module(root=str(root)).test_dataloader()))
    assert not same(after, before)


def test_a_cache_of_another_preprocessing_is_not_looked_at(
    folders: Folders, module: Module, tmp_path: Path, data_config: dict[str, Any]
) -> None:
    options = {"root": str(folders("val", a=3)), "cache": str(tmp_path / "cache")}
    list(module(**options).test_dataloader())
    for change in ({"crop_pct": 1.0}, {"interpolation": "bilinear"}, {"input_size": (3, 8, 8)}):
        other = {**options, "data_config": {**data_config, **change}}
        uncached = {**other, "cache": None}
        assert same(list(module(**other).test_dataloader()), list(module(**uncached).test_dataloader()))


def cut_pixels(folder: Path) -> None:
    with open(folder / "pixels.u8", "rb+") as file:
        file.truncate(1000)


def cut_index(folder: Path) -> None:
    content = (folder / "index.npz").read_bytes()
    (folder / "index.npz").write_bytes(content[: len(content) // 2])


def swap_index(folder: Path) -> None:
    with np.load(folder / "index.npz") as arrays:
        fewer = {name: array[:-1] for name, array in arrays.items()}
    np.savez(folder / "index.npz", **fewer)


def drop_index(folder: Path) -> None:
    (folder / "index.npz").unlink()


@pytest.mark.parametrize("damage", [cut_pixels, cut_index, swap_index, drop_index])
def test_a_damaged_cache_is_built_again(
    folders: Folders,
    module: Module,
    tmp_path: Path,
    decoded: Counter[str],
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    options = {"root": str(folders("val", a=3, b=2)), "cache": str(tmp_path / "cache")}
    before = list(module(**options).test_dataloader())
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    damage(folder)
    decoded.clear()
    assert same(list(module(**options).test_dataloader()), before)
    assert decoded["images"] == 5
    assert f"{folder}: the cache is damaged" in capsys.readouterr().out


def test_what_a_builder_that_died_has_left_is_removed(folders: Folders, module: Module, tmp_path: Path) -> None:
    options = {"root": str(folders("val", a=3)), "cache": str(tmp_path / "cache")}
    before = list(module(**options).test_dataloader())
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    folder.rename(folder.with_name(f".{folder.name}.unfinished"))
    cut_pixels(folder.with_name(f".{folder.name}.unfinished"))
    assert same(list(module(**options).test_dataloader()), before)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [folder]


def test_images_that_cannot_be_decoded(folders: Folders, module: Module, tmp_path: Path) -> None:
    root = folders("val", a=3, b=2)
    broken = root / "val" / "a" / "1.jpg"
    intact = broken.read_bytes()
    broken.write_bytes(intact[:100])
    options = {"root": str(root), "cache": str(tmp_path / "cache")}
    with pytest.raises(UserError, match=r"cannot decode image a/1\.jpg"):
        module(**options).test_dataloader()
    for _ in range(2):
        batches = list(module(**options, on_error="skip").test_dataloader())
        assert [id for batch in batches for id in batch["skipped"]] == ["a/1.jpg"]
        assert sum(len(batch["image"]) for batch in batches) == 4
    with pytest.raises(UserError, match=r"cannot decode image a/1\.jpg"):
        list(module(**options).test_dataloader())
    broken.write_bytes(intact)
    assert sum(len(batch["image"]) for batch in module(**options).test_dataloader()) == 5


def test_a_directory_that_cannot_hold_it(folders: Folders, module: Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"dataset\.cache=.*file.*: cannot keep 2 images.*dataset\.cache=null"):
        module(root=str(folders(a=2)), cache=str(tmp_path / "file" / "cache")).test_dataloader()


def test_builders_at_the_same_time(folders: Folders, module: Module, tmp_path: Path) -> None:
    root, fork = folders("val", a=150, b=150), multiprocessing.get_context("fork")
    sums = fork.SimpleQueue()

    def build() -> None:
        torch.set_num_threads(1)  # a pool of threads does not survive the fork
        data = module(root=str(root), cache=str(tmp_path / "cache"), num_workers=1)
        sums.put(sum(int(batch["image"].sum()) for batch in data.test_dataloader()))

    both = [fork.Process(target=build) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert sums.get() == sums.get() != 0
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert (folder / "pixels.u8").stat().st_size == 300 * 3 * 16 * 16
