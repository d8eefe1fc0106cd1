"""Files with random damage: every one is read, or left out, or named in one line; none ends the program or hangs."""

import io
import json
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_masks
from PIL import Image, features

from mtr_lab.data import DetectionDataModule, ImageDataModule, SegmentationDataModule
from mtr_lab.errors import UserError

DATA = {"input_size": (3, 16, 16), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
COUNTS = [200, pytest.param(2000, marks=pytest.mark.slow)]
SECONDS = 20  # for one file
VALUES = ["0", "-1", "-0.0", "1e39", "1e400", "9" * 400, "NaN", "null", "true", "[]", "[[]]", "{}"]
VALUES += ['""', '"a"', '"\\ud800"', '"../x"', "[" * 3000]


class Hang(BaseException):
    """A file took too long."""


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged metadata
        yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def damaged(content: bytes, random: Random) -> bytes:
    """A copy with one to four changes of bits, bytes or stretches, or cut short."""
    changed = bytearray(content)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(changed) + 1)
        length = random.choice([1, 1, 2, 4, 16, 200])
        how = random.randrange(6)
        if how == 0 and at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
        elif how == 1:
            changed[at : at + length] = random.randbytes(length)
        elif how == 2:
            del changed[at : at + length]
        elif how == 3:
            changed[at:at] = changed[at : at + length]
        elif how == 4:
            changed[at : at + 4] = random.choice([b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\xff\xff"])
        elif random.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def damaged_text(text: str, random: Random) -> bytes:
    """A copy with a value exchanged for an odd one; or with damaged bytes."""
    if random.random() < 0.4:
        return damaged(text.encode(), random)
    spots = [i for i, character in enumerate(text) if character in "0123456789" and text[i - 1] not in "0123456789"]
    at = random.choice(spots)
    end = next(i for i in range(at, len(text) + 1) if i == len(text) or text[i] not in "0123456789.")
    return (text[:at] + random.choice(VALUES) + text[end:]).encode(errors="surrogatepass")


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def pictures() -> dict[str, bytes]:
    """An image of every kind, by its ending."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8))
    exif = Image.Exif()
    exif[0x112] = 6
    kinds = {
        "jpg": encoded(colour, "JPEG", exif=exif),
        "progressive.jpg": encoded(colour, "JPEG", progressive=True),
        "png": encoded(colour.convert("RGBA"), "PNG", exif=exif),
        "deep.png": encoded(Image.fromarray(rng.integers(0, 65536, (20, 24), np.uint16)), "PNG"),
        "gif": encoded(colour, "GIF", save_all=True, append_images=[colour.rotate(90)]),
        "webp": encoded(colour, "WEBP", exif=exif),
        "bmp": encoded(colour, "BMP"),
        "tif": encoded(colour, "TIFF", compression="tiff_lzw"),
        "float.tif": encoded(Image.fromarray(rng.random((20, 24), np.float32)), "TIFF"),
        "ppm": encoded(colour, "PPM"),
    }
    return {**kinds, **({"avif": encoded(colour, "AVIF")} if features.check("avif") else {})}


@pytest.mark.parametrize("count", COUNTS)
def test_images(tmp_path: Path, count: int) -> None:
    random, kinds = Random(1), pictures()
    (tmp_path / "a").mkdir()
    for number in range(count):
        ending = random.choice(list(kinds))
        (tmp_path / "a" / f"{number}.{ending}").write_bytes(damaged(kinds[ending], random))
    config = {**DATA, "interpolation": "bicubic", "crop_pct": 0.9}
    data = ImageDataModule(name="test", data_config=config, root=str(tmp_path), on_error="skip", batch_size=1)
    read = skipped = 0
    signal.alarm(SECONDS)
    for batch in data.test_dataloader():
        read, skipped = read + len(batch["id"]), skipped + len(batch["skipped"])
        signal.alarm(SECONDS)
    assert read + skipped == count
    assert read > count / 10
    assert skipped > count / 10


def outcomes(write: Callable[[bytes], None], mutate: Callable[[], bytes], read: Callable[[], Any], count: int) -> int:
    """The number of damaged files that are named in one line; the others are read."""
    named = lines = 0
    for _ in range(count):
        write(mutate())
        signal.alarm(SECONDS)
        try:
            read()
        except UserError as error:
            named += 1
            lines += str(error).count("\n") + 1
    assert lines == named
    return named


@pytest.mark.parametrize("count", COUNTS)
def test_label_maps(tmp_path: Path, count: int) -> None:
    random = Random(2)
    labels = np.random.default_rng(0).integers(0, 3, (20, 24))
    indexed = Image.fromarray(labels.astype(np.uint8))
    indexed.putpalette(range(256))
    kinds = [
        (".png", encoded(Image.fromarray(labels.astype(np.uint8)), "PNG")),
        (".png", encoded(indexed, "PNG")),
        (".tif", encoded(Image.fromarray(labels.astype(np.uint16)), "TIFF")),
        (".bmp", encoded(indexed, "BMP")),
    ]
    for folder in ("images", "labels"):
        (tmp_path / "val" / folder).mkdir(parents=True)
    Image.new("RGB", (24, 20)).save(tmp_path / "val/images/x.jpg")
    kind = [""]

    def mutate() -> bytes:
        kind[0], content = random.choice(kinds)
        return damaged(content, random)

    def write(content: bytes) -> None:
        for file in (tmp_path / "val/labels").iterdir():
            file.unlink()
        (tmp_path / f"val/labels/x{kind[0]}").write_bytes(content)

    def read() -> None:
        list(
            SegmentationDataModule(
                name="test",
                data_config=DATA,
                root=str(tmp_path),
                layout="camvid",
                classes=["a", "b", "c"],
                train_transform={"scale": [1, 1], "color_jitter": 0},
            ).test_dataloader()
        )

    assert count / 10 < outcomes(write, mutate, read, count) < count


def detect(root: Path, source: str, masks: bool = False) -> None:
    data = DetectionDataModule(
        name="test",
        data_config=DATA,
        root=str(root),
        source=source,
        masks=masks,
        on_error="skip",
        train_transform={"scale": [1, 1], "turns": False, "color_jitter": 0},
    )
    data.fingerprint()
    list(data.test_dataloader())


@pytest.mark.parametrize("count", COUNTS)
def test_annotations_of_voc(tmp_path: Path, count: int) -> None:
    random = Random(3)
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/val.txt").write_text("x\n")
    Image.new("RGB", (24, 20)).save(tmp_path / "JPEGImages/x.jpg")
    thing = (
        "<object><name>cell</name><difficult>0</difficult>"
        "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>10</xmax><ymax>12.5</ymax></bndbox></object>"
    )
    size = "<size><width>24</width><height>20</height><depth>3</depth></size>"
    text = f"<?xml version='1.0' encoding='utf-8'?>\n<annotation>{size}{2 * thing}</annotation>"
    named = outcomes(
        (tmp_path / "Annotations/x.xml").write_bytes,
        lambda: damaged_text(text, random),
        lambda: detect(tmp_path, "voc"),
        count,
    )
    assert count / 10 < named < count


@pytest.mark.parametrize("count", COUNTS)
def test_annotations_of_coco(tmp_path: Path, count: int) -> None:
    random = Random(4)
    for folder in ("annotations", "val"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (24, 20)).save(tmp_path / "val/x.png")
    one = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [2, 3, 8, 9.5], "iscrowd": 0}
    runs = coco_masks.encode(np.asfortranarray(np.eye(20, 24, dtype=np.uint8)))["counts"]
    content = {
        "images": [{"id": 7, "file_name": "x.png", "width": 24, "height": 20}],
        "categories": [{"id": 3, "name": "cell"}],
        "annotations": [
            {**one, "segmentation": [[2, 3, 10, 3, 10, 12, 2, 12]]},
            {**one, "segmentation": {"size": [20, 24], "counts": [40, 20, 420]}},
            {**one, "segmentation": {"size": [20, 24], "counts": runs.decode() if isinstance(runs, bytes) else runs}},
        ],
    }
    text = json.dumps(content)
    named = outcomes(
        (tmp_path / "annotations/instances_val.json").write_bytes,
        lambda: damaged_text(text, random),
        lambda: detect(tmp_path, "coco", masks=True),
        count,
    )
    assert count / 10 < named < count
