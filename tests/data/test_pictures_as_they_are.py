"""Pictures as they are: more than 8 bits, EXIF orientation, animations, transparency; labels follow the orientation."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, ExifTags, Image, features

from mtr_lab.data import DetectionDataModule, ImageDataModule, SegmentationDataModule
from mtr_lab.data.clips import read_clip
from mtr_lab.data.images import TURNS, read_picture
from mtr_lab.data.pictures import open_picture
from mtr_lab.errors import UserError
from mtr_lab.report.dashboard.thumbnails import thumbnail

Module = Callable[..., ImageDataModule]
RAMP = np.linspace(0, 1, 16 * 16).reshape(16, 16)


def saved(folder: Path, image: Image.Image | np.ndarray, name: str, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(folder / name, **options)
    return folder / name


@pytest.fixture
def pixels(tmp_path: Path, module: Module) -> Callable[..., torch.Tensor]:
    """Save one image and evaluate it: (3, 16, 16)."""

    def evaluate(image: Any, name: str, options: dict[str, Any] | None = None, **save: Any) -> torch.Tensor:
        saved(tmp_path / "a", image, name, **save)
        crop_pct = {"data_config": {**DATA, "crop_pct": 1.0}}
        (batch,) = module(root=str(tmp_path), **crop_pct, **(options or {})).test_dataloader()
        return batch["image"][0]

    return evaluate


DATA = {
    "input_size": (3, 16, 16),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_grey_values_of_16_bits(pixels: Callable[..., torch.Tensor], name: str) -> None:
    seen = pixels((RAMP * 65535).astype(np.uint16), name)
    assert (seen[0].numpy() == np.rint((RAMP * 65535).astype(np.uint16) / 257)).all()
    assert (seen[0] == seen[2]).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_values_of_32_bits(pixels: Callable[..., torch.Tensor], dtype: type) -> None:
    most = 65535 if dtype is np.int32 else 1
    seen = pixels((RAMP * most).astype(dtype), "x.tif")
    assert np.abs(seen[0].numpy() - RAMP * 255).max() <= 0.51


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.full((9, 9), 65536, np.int32), "its 32-bit values are from 65536 to 65536, expected 0 to 65535"),
        (np.full((9, 9), -1, np.int32), "its 32-bit values are from -1 to -1"),
        (np.full((9, 9), 1.5, np.float32), "its floating-point values are from 1.5 to 1.5, expected 0 to 1"),
        (np.full((9, 9), np.nan, np.float32), "its floating-point values are from nan to nan"),
    ],
)
def test_grey_values_out_of_range(pixels: Callable[..., torch.Tensor], values: np.ndarray, expected: str) -> None:
    with pytest.raises(UserError, match=rf"cannot decode image a/x\.tif of .*: {expected}"):
        pixels(values, "x.tif")


def test_what_is_decided_is_said_once(
    tmp_path: Path, module: Module, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    red, blue = (Image.new("RGB", (20, 20), colour) for colour in ("red", "blue"))
    for number in range(3):
        saved(tmp_path / "a", red, f"{number}.gif", save_all=True, append_images=[blue])
        saved(tmp_path / "b", Image.new("RGBA", (20, 20), (0, 0, 0, 0)), f"{number}.png")
        saved(tmp_path / "c", Image.new("RGBA", (20, 20), (9, 9, 9, 255)), f"{number}.png")
        saved(tmp_path / "d", Image.new("L", (20, 20), 7), f"{number}.png", transparency=7)
    batches = list(module(root=str(tmp_path), batch_size=3, num_workers=1).test_dataloader())
    first, white, opaque, grey = (batch["image"].float().mean((0, 2, 3)).round().tolist() for batch in batches)
    assert first == [254, 0, 0] or first == [255, 0, 0]
    assert (white, opaque, grey) == ([255] * 3, [9] * 3, [255] * 3)
    said = capfd.readouterr().err
    assert said.count("a/0.gif has several frames: the first one is taken, as of all such images.") == 1
    assert said.count("has transparent pixels: drawn on white") == 1


def tagged(tag: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = tag
    return exif


SCENE = np.zeros((24, 40, 3), np.uint8)  # as a viewer shows it: an object at rows 3 to 9, columns 5 to 30
SCENE[3:9, 5:30] = 255
BOX = [5, 3, 30, 9]
INVERSE = {6: 8, 8: 6}


def stored(tag: int) -> Image.Image:
    """The scene as a camera stores it with this orientation."""
    return Image.fromarray(SCENE).transpose(TURNS[INVERSE.get(tag, tag)])


@pytest.mark.parametrize("tag", TURNS)
def test_exif_orientation(tmp_path: Path, tag: int) -> None:
    for ending in ["png", "webp", "jpg", *(["avif"] if features.check("avif") else [])]:
        content = saved(tmp_path, stored(tag), f"x.{ending}", exif=tagged(tag), quality=95).read_bytes()
        picture = read_picture(content)
        assert np.abs(np.asarray(picture.seen("apply")).astype(int) - SCENE).mean() < 4
        assert picture.seen("ignore").size == stored(tag).size


def test_damaged_exif_data_leave_the_image(tmp_path: Path) -> None:
    content = saved(tmp_path, SCENE, "x.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff").read_bytes()
    assert read_picture(content).seen("apply").size == (40, 24)


def test_the_cache_keeps_both_orientations_apart(tmp_path: Path, module: Module) -> None:
    saved(tmp_path / "val/a", stored(6), "x.png", exif=tagged(6))
    seen = {
        (exif, cache): next(iter(module(root=str(tmp_path), exif=exif, cache=cache).test_dataloader()))["image"]
        for cache in (None, str(tmp_path / "cache"))
        for exif in ("apply", "ignore")
    }
    for exif in ("apply", "ignore"):
        assert torch.equal(seen[exif, None], seen[exif, str(tmp_path / "cache")])
    assert not torch.equal(seen["apply", None], seen["ignore", None])
    with pytest.raises(UserError, match=r"unknown dataset\.exif 'none'.*Available: apply, ignore"):
        module(root=str(tmp_path), exif="none")


def detection(root: Path, source: str, **options: Any) -> DetectionDataModule:
    transform = {"scale": [1, 1], "turns": False, "color_jitter": 0}
    data: dict[str, Any] = {"name": "test", "data_config": DATA, "train_transform": transform, **options}
    return DetectionDataModule(root=str(root), source=source, **data)


def box_of(image: torch.Tensor) -> list[int]:
    """The white object's box."""
    rows, columns = torch.where(image > 0.5)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def stored_box(tag: int) -> list[int]:
    return box_of(torch.from_numpy(np.asarray(stored(tag))[..., 0] / 255))


def write_coco(root: Path, tag: int, size: tuple[int, int], box: list[int], **more: Any) -> Path:
    saved(root / "val", stored(tag), "x.png", exif=tagged(tag))
    left, top, right, bottom = box
    outline = [[left, top, right, top, right, bottom, left, bottom]]
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [left, top, right - left, bottom - top]}
    content = {
        "images": [{"id": 1, "file_name": "x.png", "height": size[0], "width": size[1]}],
        "categories": [{"id": 1, "name": "white"}],
        "annotations": [{**annotation, "segmentation": outline}],
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations/instances_val.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("exif", ["apply", "ignore"])
@pytest.mark.parametrize("tag", [5, 6, 7, 8])
@pytest.mark.parametrize("frame", ["upright", "stored"])
def test_boxes_and_masks_follow_the_orientation_whose_size_is_stated(
    tmp_path: Path, exif: str, tag: int, frame: str
) -> None:
    size, box = ((24, 40), BOX) if frame == "upright" else ((40, 24), stored_box(tag))
    data = detection(write_coco(tmp_path, tag, size, box), "coco", masks=True, exif=exif)
    (batch,) = data.test_dataloader()
    assert batch["original_size"] == [(24, 40) if exif == "apply" else (40, 24)]
    expected = BOX if exif == "apply" else stored_box(tag)
    assert batch["objects"][0]["boxes"].tolist() == [expected]
    assert box_of(batch["objects"][0]["masks"][0]) == expected


def test_a_stated_size_that_fits_no_orientation(tmp_path: Path) -> None:
    write_coco(tmp_path, 6, (24, 41), BOX)
    with pytest.raises(UserError, match=r"image x\.png of .* states 41 x 24 pixels, the image has 40 x 24"):
        list(detection(tmp_path, "coco").test_dataloader())
    for unstated in ((0, 0), (24, None)):
        write_coco(tmp_path, 6, unstated, BOX)  # type: ignore[arg-type]
        (batch,) = detection(tmp_path, "coco").test_dataloader()
        assert batch["objects"][0]["boxes"].tolist() == [BOX]


@pytest.mark.parametrize("frame", ["upright", "stored"])
def test_label_maps_follow_the_orientation(tmp_path: Path, frame: str) -> None:
    """And are read as they are: values of 16 bits are classes, the maps' own EXIF data are not read."""
    labels = SCENE[..., 0] // 255 if frame == "upright" else np.asarray(stored(6))[..., 0] // 255
    saved(tmp_path / "val/images", stored(6), "x.png", exif=tagged(6))
    saved(tmp_path / "val/labels", labels.astype(np.uint16), "x.tif")
    data = SegmentationDataModule(
        name="test",
        data_config=DATA,
        root=str(tmp_path),
        layout="camvid",
        classes=["black", "white"],
        train_transform={"scale": [1, 1], "color_jitter": 0},
    )
    (batch,) = data.test_dataloader()
    assert np.array_equal(batch["label"][0].numpy(), SCENE[..., 0] // 255)
    shutil.rmtree(tmp_path / "val/labels")
    saved(tmp_path / "val/labels", np.full((24, 40), 0.5, np.float32), "x.tif")
    with pytest.raises(UserError, match=r"label map .*x\.tif has values that are not whole numbers"):
        list(data.test_dataloader())


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would hand it to Ghostscript, whatever the file is called."""
    (program := tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(program))
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with contextlib.suppress(OSError), Image.open(io.BytesIO(content)) as image:
        image.load()
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    (picture := tmp_path / "a.png").write_bytes(content)
    for read in (open_picture, thumbnail, lambda file: read_clip(file, 1)):
        with pytest.raises((UserError, OSError), match="no known image format|cannot identify"):
            read(picture)
    assert not (tmp_path / "ran").exists()
