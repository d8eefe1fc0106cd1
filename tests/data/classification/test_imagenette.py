"""``dataset.source=imagenette`` uses existing directories, and downloads a missing dataset by torchvision."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mtr_lab.data import ImageDataModule, imagenet_classes
from mtr_lab.errors import UserError

Module = Callable[..., ImageDataModule]


@pytest.fixture
def downloads(tmp_path: Path, folders: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A fake network: unpacks two classes, and records the requested addresses."""
    asked: list[str] = []
    for split in ("train", "val"):
        for image in list((folders(f"archive/{split}", n01440764=2, n02102040=1) / "archive" / split).rglob("*.jpg")):
            image.rename(image.with_suffix(".JPEG"))

    def unpack(url: str, root: str | Path, md5: str) -> None:
        asked.append(url)
        shutil.copytree(tmp_path / "archive", Path(root) / "imagenette2")

    monkeypatch.setattr("torchvision.datasets.imagenette.download_and_extract_archive", unpack)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return asked


def test_it_is_downloaded_once_and_meets_imagenet_weights(module: Module, downloads: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for root in (None, None, str(tmp_path / "empty"), str(tmp_path / "empty")):
        data = module(source="imagenette", root=root, model_classes=imagenet_classes(), num_classes=1000)
        (batch,) = data.test_dataloader()
        assert batch["label"].tolist() == [0, 0, 217]
    assert len(downloads) == 2
    assert downloads[0].endswith("/imagenette2.tgz")
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == [".imagenette.lock", "imagenette2"]


def test_it_is_taken_as_released(module: Module, downloads: list[str], tmp_path: Path) -> None:
    for root in ("archive", "archive/val"):
        assert module(source="imagenette", root=str(tmp_path / root)).num_images == 3
    assert not downloads


def test_a_root_that_does_not_exist_is_a_mistake(module: Module, downloads: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset 'imagenette', dataset\.root: .*nowhere is not a directory"):
        module(source="imagenette", root=str(tmp_path / "nowhere"))
    assert not downloads


def test_without_a_network_the_error_says_what_to_unpack(
    module: Module, downloads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(url: str, root: str, md5: str) -> None:
        (Path(root) / "imagenette2").mkdir()  # half unpacked
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.imagenette.download_and_extract_archive", offline)
    for _ in range(2):
        with pytest.raises(UserError, match=r"cannot be downloaded \(no network\): unpack imagenette2\.tgz"):
            module(source="imagenette")
