"""Segmentation data: layouts, batches for training and evaluation, messages for wrong files."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mtr_lab.data import SegmentationDataModule
from mtr_lab.data.segmentation.label_maps import IGNORE, LabelMapSource
from mtr_lab.errors import UserError

DATA = {"input_size": (3, 32, 48), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CLASSES = ["ground", "thing", "sky"]


def save(folder: Path, name: str, labels: np.ndarray, image: np.ndarray | None = None) -> None:
    """A label map, and an image that is bright where the label is 1."""
    for each in ("images", "labels"):
        (folder / each).mkdir(parents=True, exist_ok=True)
    bright = np.where(labels == 1, 220, 30).astype(np.uint8)
    Image.fromarray(np.repeat(bright[..., None], 3, 2) if image is None else image).save(folder / f"images/{name}.jpg")
    Image.fromarray(labels.astype(np.uint8)).save(folder / f"labels/{name}.png")


def scene(height: int = 40, width: int = 60) -> np.ndarray:
    """An object on the ground below the sky, and a column to ignore."""
    labels = np.zeros((height, width), np.int64)
    labels[: height // 4] = 2
    labels[height // 2 :, width // 4 : width // 2] = 1
    labels[:, -1] = 11
    return labels


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(4):
        save(tmp_path / "train", f"t{number}", scene())
    for number in range(3):
        save(tmp_path / "val", f"v{number}", scene(40 + 10 * number, 60))
    return tmp_path


def datamodule(root: Path, **changes: Any) -> SegmentationDataModule:
    settings: dict[str, Any] = {"layout": "camvid", "classes": CLASSES, "batch_size": 2}
    settings["train_transform"] = {"scale": [0.7, 2.0], "color_jitter": 0.0}
    return SegmentationDataModule(name="test", data_config=DATA, root=str(root), **{**settings, **changes})


@pytest.mark.parametrize(
    ("layout", "image", "label", "written", "read"),
    [
        ("camvid", "a/images/x.jpg", "a/labels/x.png", [0, 2, 11], [0, 2, IGNORE]),
        ("ade20k", "images/a/x.jpg", "annotations/a/x.png", [0, 1, 3], [IGNORE, 0, 2]),
        ("voc", "JPEGImages/x.jpg", "SegmentationClass/x.png", [0, 2, 255], [0, 2, IGNORE]),
    ],
)
def test_layouts(tmp_path: Path, layout: str, image: str, label: str, written: list[int], read: list[int]) -> None:
    for path in (image, label):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 1)).save(tmp_path / image)
    indexed = Image.fromarray(np.array([written], np.uint8))
    if layout == "voc":
        indexed.putpalette(range(256))  # coloured label maps with a palette are accepted
    indexed.save(tmp_path / label)
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/a.txt").write_text("x\n")
    source = LabelMapSource(tmp_path, "a", layout, CLASSES)
    assert [source.id(i) for i in range(len(source))] == ["x"]
    assert source.labels(0).tolist() == [read]


def test_images_and_maps_of_other_formats(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for ending in ("PNG", "webp"):
        Image.new("RGB", (60, 40)).save(root / f"val/images/{ending}.{ending}", ending.upper())
        Image.fromarray(scene().astype(np.uint8)).save(root / f"val/labels/{ending}.bmp")
    Image.new("RGB", (9, 9)).save(root / "val/images/v0.png")  # beside v0.jpg
    (root / "val/images/._v0.jpg").touch()
    assert run_through(datamodule(root)) == ["PNG", "v0", "v1", "v2", "webp"]
    said = capsys.readouterr().out
    assert "left out: hidden files: 1 (._v0.jpg); other files and folders: 1 (v0.png)" in said


def test_an_image_that_is_missing_may_be_skipped(tmp_path: Path) -> None:
    """Of a list, and names with blanks."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("my image\nother\n")
    for name in ("my image", "other"):
        Image.fromarray(np.zeros((40, 60), np.uint8)).save(tmp_path / f"SegmentationClass/{name}.png")
    Image.new("RGB", (60, 40)).save(tmp_path / "JPEGImages/my image.png")
    with pytest.raises(UserError, match=r"JPEGImages/other\.jpg is missing"):
        datamodule(tmp_path, layout="voc")
    (batch,) = datamodule(tmp_path, layout="voc", on_error="skip").test_dataloader()
    assert (list(batch["id"]), batch["skipped"]) == (["my image"], ["other"])
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("../x\n")
    with pytest.raises(UserError, match=r"val\.txt, line 1: the file name '\.\./x' leads out"):
        datamodule(tmp_path, layout="voc")


def test_an_image_that_is_listed_twice(tmp_path: Path) -> None:
    for folder, ending in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        (tmp_path / folder).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / folder / f"a.{ending}")
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("a\n./a\n")
    with pytest.raises(UserError, match=r"val\.txt lists the image 'a' more than once"):
        datamodule(tmp_path, layout="voc")


def test_labels_stay_on_their_pixels_in_training(root: Path) -> None:
    data = datamodule(root)
    data.setup("fit")
    scales = set()
    loader = data.train_dataloader()
    for epoch in range(4):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            assert batch["image"].shape == (2, 3, 32, 48)
            assert batch["label"].shape == (2, 32, 48)
            assert batch["label"].dtype == torch.int64
            counted = batch["label"] != IGNORE
            assert set(batch["label"][counted].tolist()) <= {0, 1, 2}
            bright = batch["image"][:, 0] > 0
            assert ((bright == (batch["label"] == 1)) | ~counted).float().mean() > 0.97  # all but edges
            scales.add(int(counted.sum()))
    assert len(scales) > 4


def test_training_is_repeatable(root: Path) -> None:
    def first() -> torch.Tensor:
        torch.manual_seed(0)
        return next(iter(datamodule(root, seed=3).train_dataloader()))["image"]

    assert torch.equal(first(), first())


def test_whole_images_fill_the_window_as_far_as_their_shape_allows(root: Path) -> None:
    batch = next(iter(datamodule(root, batch_size=3).test_dataloader()))
    assert batch["image"].shape == (3, 3, 32, 48)
    assert batch["windows"] == [[(0, 0)]] * 3
    assert batch["size"] == [(32, 48), (32, 38), (32, 32)]
    assert [tuple(labels.shape) for labels in batch["label"]] == [(40, 60), (50, 60), (60, 60)]
    assert (batch["image"][2, :, :, 32:] == 0).all()  # the mean colour
    assert batch["label"][0].unique().tolist() == [0, 1, 2, IGNORE]


@pytest.mark.parametrize(("height", "width"), [(40, 60), (40, 200), (130, 60), (33, 48)])
def test_sliding_windows_cover_the_image(tmp_path: Path, height: int, width: int) -> None:
    save(
        tmp_path / "val",
        "x",
        scene(height, width),
        np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8),
    )
    (batch,) = datamodule(tmp_path, inference="slide").test_dataloader()
    (places,), (size,) = batch["windows"], batch["size"]
    assert len(batch["image"]) == len(places)
    assert min(size[0] - 32, size[1] - 48) == 0
    covered = torch.zeros(size)
    whole = torch.full((3, *size), torch.nan)
    for window, (top, left) in zip(batch["image"], places, strict=True):
        overlap = whole[:, top : top + 32, left : left + 48]
        assert torch.equal(torch.where(overlap.isnan(), window, overlap), window)  # windows agree where they overlap
        whole[:, top : top + 32, left : left + 48] = window
        covered[top : top + 32, left : left + 48] += 1
    assert covered.min() == 1
    starts = sorted({top + left for top, left in places})
    assert all(after - before <= 32 for before, after in pairwise(starts))


def test_pixels_of_the_classes_are_counted(root: Path) -> None:
    ground, thing, sky = datamodule(root).class_pixels().tolist()
    assert (thing, sky) == (4 * 20 * 15, 4 * 10 * 59)
    assert ground == 4 * 40 * 59 - thing - sky


def test_classes_of_another_order_become_those_of_the_model(root: Path) -> None:
    data = datamodule(root, model_classes=("sky", "thing", "ground"), num_classes=3)
    batch = next(iter(data.test_dataloader()))
    assert batch["label"][0][0, 0] == 0
    assert batch["label"][0][-1, 0] == 2
    assert batch["label"][0][0, -1] == IGNORE


def run_through(data: SegmentationDataModule) -> list[str]:
    return [id for batch in data.test_dataloader() for id in batch["id"]]


def test_a_label_out_of_range(root: Path) -> None:
    labels = scene()
    labels[3, 3] = 7
    save(root / "val", "v1", labels)
    with pytest.raises(UserError, match=r"v1\.png has the label 7: expected 0 to 2, or 11 to ignore"):
        run_through(datamodule(root, on_error="skip"))


def test_a_label_map_of_another_size(root: Path) -> None:
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(root / "val/labels/v1.png")
    with pytest.raises(UserError, match=r"label map of image v1 .* states 30 x 20 pixels, the image has 60 x 50"):
        run_through(datamodule(root))


def test_a_label_map_of_colours(root: Path) -> None:
    Image.new("RGB", (60, 50)).save(root / "val/labels/v1.png")
    with pytest.raises(UserError, match=r"v1\.png has 3 channels: expected one"):
        run_through(datamodule(root))


def test_a_damaged_label_map(root: Path) -> None:
    (root / "val/labels/v1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot decode the label map .*v1\.png: no known image format"):
        run_through(datamodule(root))


def test_a_missing_label_map_is_found_at_once(root: Path) -> None:
    (root / "val/labels/v1.png").unlink()
    with pytest.raises(UserError, match=r"labels/v1\.png is missing"):
        datamodule(root)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layout": "camvids"}, r"unknown dataset\.layout 'camvids'. Did you mean 'camvid'"),
        ({"layout": "ade20k"}, r"no images for the split 'val'"),
        ({"layout": "voc"}, r"ImageSets/Segmentation/val\.txt does not exist"),
        ({"test_split": "test"}, r"no images for the split 'test'"),
        ({"classes": 1}, r"dataset\.classes"),
        ({"classes": "sky"}, r"dataset\.classes=sky: expected 2 to 255 names"),
        ({"inference": "tiles"}, r"unknown dataset\.inference"),
        ({"train_transform": {"scale": [1, 2]}}, "expected color_jitter, scale"),
        ({"train_transform": {"scale": 1, "color_jitter": 0}}, "two factors"),
        ({"train_transform": {"scale": [2, 1], "color_jitter": 0}}, "least factor before the largest"),
    ],
)
def test_mistakes_in_the_configuration(root: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        datamodule(root, **changes)
