"""Detection data: batches from VOC and COCO files, and messages for wrong files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mtr_lab.data import DetectionDataModule
from mtr_lab.data.detection.transforms import Augmentation, Canvas
from mtr_lab.errors import UserError

Write = Callable[..., Path]
SIZE = (60, 100)  # of the images: height, width


def module(root: Path, source: str, **options: Any) -> DetectionDataModule:
    """A data module with a canvas of 48 x 64."""
    config = {"input_size": (3, 48, 64), "mean": (0.5, 0.25, 0.75), "std": (0.5, 0.5, 0.5)}
    augmentation = {"scale": [0.5, 2.0], "turns": True, "color_jitter": 0.2}
    fixed: dict[str, Any] = {"name": "cells", "data_config": config, "batch_size": 2, "train_transform": augmentation}
    return DetectionDataModule(root=str(root), source=source, **{**fixed, **options})


def write_image(path: Path, height: int = SIZE[0], width: int = SIZE[1]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def voc_object(name: str, *edges: object, difficult: object = 0) -> str:
    written = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), edges, strict=True)
    )
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{written}</bndbox></object>"


@pytest.fixture
def voc(tmp_path: Path) -> Write:
    """``voc(a=[objects], b=[…])``: images a, b … of both splits in VOC's layout."""

    def write(**images: list[str]) -> Path:
        root = tmp_path / "voc"
        for folder in ("ImageSets/Main", "Annotations"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for split in ("train", "val"):
            (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(images))
        for name, objects in images.items():
            write_image(root / "JPEGImages" / f"{name}.jpg")
            (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{''.join(objects)}</annotation>")
        return root

    return write


@pytest.fixture
def coco(tmp_path: Path) -> Write:
    """``coco(annotations, **changes)``: two images and two categories, whose ids are neither in order nor from 0."""

    def write(annotations: list[Any], **changes: Any) -> Path:
        root = tmp_path / "coco"
        content = {
            "images": [{"id": 7, "file_name": "x.jpg"}, {"id": 3, "file_name": "y.jpg"}],
            "categories": [{"id": 90, "name": "dog"}, {"id": 18, "name": "cat"}],
            "annotations": annotations,
            **changes,
        }
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / "annotations/instances_val.json").write_text(json.dumps(content))
        for name in ("x.jpg", "y.jpg"):
            write_image(root / "val" / name)
        return root

    return write


def coco_object(
    image: object = 7, category: object = 90, bbox: object = (10, 20, 30, 15), **more: Any
) -> dict[str, Any]:
    return {"id": 1, "image_id": image, "category_id": category, "bbox": bbox, **more}


def test_voc_objects_in_pixels_of_the_image(voc: Write) -> None:
    root = voc(a=[voc_object("wbc", 10, 20, 40, 35), voc_object("rbc", 0, 0, 5, 6, difficult=1)], b=[])
    data = module(root, "voc")
    assert data.class_names == ("rbc", "wbc")
    (batch,) = data.test_dataloader()
    assert list(batch["id"]) == ["a", "b"]
    assert batch["image"].shape == (2, 3, 48, 64)
    assert batch["original_size"] == [SIZE, SIZE]
    assert batch["size"] == [(38, 64)] * 2  # the largest size that fits the canvas
    first, without_objects = batch["objects"]
    assert first["boxes"].tolist() == [[10, 20, 40, 35], [0, 0, 5, 6]]
    assert first["labels"].tolist() == [1, 0]
    assert first["iscrowd"].tolist() == [False, True]
    assert without_objects["boxes"].shape == (0, 4)
    assert without_objects["labels"].dtype == torch.int64
    assert batch["image"][:, :, 38:] == pytest.approx(0, abs=0.01)  # beyond the image, the mean colour


def test_classes_in_the_order_given_and_those_of_the_model(voc: Write) -> None:
    root = voc(a=[voc_object("wbc", 10, 20, 40, 35), voc_object("rbc", 0, 0, 5, 6)])
    for options in ({"classes": ["wbc", "rbc"]}, {"model_classes": ["wbc", "rbc"], "num_classes": 2}):
        (batch,) = module(root, "voc", **options).test_dataloader()
        assert batch["objects"][0]["labels"].tolist() == [0, 1]


def test_voc_may_lie_one_directory_deeper(voc: Write) -> None:
    assert module(voc(a=[]).parent, "voc", classes=["rbc"]).num_images == 1


def test_coco_objects_by_category_id(coco: Write) -> None:
    crowd = coco_object(3, 18, (0, 0, 4, 4), iscrowd=1)
    data = module(coco([coco_object(), crowd]), "coco")
    assert data.class_names == ("cat", "dog")
    (batch,) = data.test_dataloader()
    assert list(batch["id"]) == ["y.jpg", "x.jpg"]
    y, x = batch["objects"]
    assert (y["labels"].tolist(), y["iscrowd"].tolist()) == ([0], [True])
    assert (x["labels"].tolist(), x["boxes"].tolist()) == ([1], [[10, 20, 40, 35]])


def test_coco_outlines_become_masks(coco: Write) -> None:
    square = [[10, 20, 40, 20, 40, 35, 10, 35]]
    runs = {"size": list(SIZE), "counts": [0, 60, 60 * 99]}  # the first column
    data = module(coco([coco_object(segmentation=square), coco_object(segmentation=runs)]), "coco", masks=True)
    masks = next(iter(data.test_dataloader()))["objects"][1]["masks"].bool()
    expected = torch.zeros(2, *SIZE, dtype=torch.bool)
    expected[0, 20:35, 10:40] = True
    expected[1, :, 0] = True
    assert torch.equal(masks, expected)


def test_boxes_without_area_are_left_out_and_counted(
    voc: Write, coco: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    (batch,) = module(voc(a=[voc_object("rbc", 5, 6, 5, 9), voc_object("rbc", 5, 6, 7, 9)]), "voc").test_dataloader()
    assert len(batch["objects"][0]["boxes"]) == 1
    assert "1 boxes without area are left out" in capsys.readouterr().out
    (batch,) = module(coco([coco_object(bbox=[1, 2, 0, 5])]), "coco").test_dataloader()
    assert [len(each["boxes"]) for each in batch["objects"]] == [0, 0]


def test_boxes_end_at_the_edge_of_the_image(voc: Write) -> None:
    (batch,) = module(voc(a=[voc_object("rbc", -3, 50, 20, 61)]), "voc").test_dataloader()
    assert batch["objects"][0]["boxes"].tolist() == [[0, 50, 20, 60]]


@pytest.mark.parametrize("turns", [False, True])
def test_boxes_and_masks_follow_the_augmented_image(turns: bool) -> None:
    """The only white object: after any augmentation, box and mask enclose the white pixels."""
    torch.manual_seed(0)
    image = torch.zeros(3, *SIZE, dtype=torch.uint8)
    image[:, 22:40, 30:64] = 255
    boxes = torch.tensor([[30.0, 22, 64, 40]])
    augment = Augmentation(Canvas((48, 64), (0, 0, 0)), (0.7, 1.5), turns, 0)
    upright = 0
    for _ in range(40):
        scene = augment(image, boxes, (image[:1] > 0).byte())
        white = scene.image[0] > 127
        if not len(scene.boxes):
            assert white.float().mean() < 0.1
            continue
        rows, columns = torch.where(white)
        around = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (scene.boxes[0] - around).abs().max() <= 1.01
        assert (scene.masks[0].bool() ^ white).float().mean() < 0.02
        assert scene.boxes[0, 3] <= scene.size[0]
        left, top, right, bottom = scene.boxes[0].tolist()
        upright += bottom - top > right - left
    assert (upright > 5) == turns


def test_objects_out_of_the_window_are_not_of_it() -> None:
    image = torch.zeros(3, *SIZE, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0, 20, 20], [30, 30, 50, 50], [0, 0, 38, 38]])
    scene = Canvas((32, 32), (0, 0, 0)).crop(image, boxes, None, (28, 28, 32, 32), 1.0)
    assert scene.kept.tolist() == [1]
    assert scene.boxes.tolist() == [[2, 2, 22, 22]]


def test_held_out_images_are_not_trained_on_and_ignored_objects_neither(voc: Write) -> None:
    objects = [voc_object("rbc", 10, 10, 60, 50), voc_object("rbc", 20, 10, 70, 50, difficult=1)]
    root = voc(**{f"image{i}": objects for i in range(12)})
    data = module(root, "voc", holdout=0.4, train_transform={"scale": [1, 1], "turns": False, "color_jitter": 0})
    data.setup("fit")
    training = list(data.train_dataloader())
    trained = {id for batch in training for id in batch["id"]}
    held_out = list(data.val_dataloader())  # type: ignore[union-attr]
    assert trained
    assert not trained & {id for batch in held_out for id in batch["id"]}
    assert all(len(each["boxes"]) == 1 for batch in training for each in batch["objects"])
    assert all(len(each["boxes"]) == 2 for batch in held_out for each in batch["objects"])


def test_a_missing_image_stops_or_is_named(voc: Write) -> None:
    root = voc(a=[voc_object("rbc", 1, 1, 9, 9)], b=[])
    (root / "JPEGImages/b.jpg").unlink()
    with pytest.raises(UserError, match=r"cannot decode image b of .*val\.txt.*on_error=skip"):
        list(module(root, "voc").test_dataloader())
    (batch,) = module(root, "voc", on_error="skip").test_dataloader()
    assert (list(batch["id"]), batch["skipped"]) == (["a"], ["b"])
    assert module(root, "voc").fingerprint() != module(voc(a=[], b=[]), "voc", classes=["rbc"]).fingerprint()


def write_xml(root: Path, content: str) -> None:
    (root / "Annotations/a.xml").write_text(content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<annotation><object>", r"a\.xml is not valid XML"),
        (voc_object("rbc", 1, 2, "wide", 4), r"object 0 has no box of the four numbers"),
        (voc_object("rbc", 1, 2, "1_0", 4), r"object 0 has no box of the four numbers"),
        ("<a><object><name>rbc</name></object></a>", r"object 0 has no box of the four numbers"),
        (voc_object("", 1, 2, 3, 4), r"object 0 has no name"),
        (voc_object("rbx", 1, 2, 3, 4), r"unknown class in .*a\.xml.*'rbx'. Did you mean 'rbc'"),
        (voc_object("rbc", 9, 2, 3, 4), r"left 9, top 2, right 3, bottom 4 is invalid"),
        (voc_object("rbc", "nan", 2, 3, 4), r"left nan.* is invalid"),
    ],
)
def test_a_wrong_xml_file_is_named(voc: Write, content: str, expected: str) -> None:
    root = voc(a=[])
    write_xml(root, content)
    with pytest.raises(UserError, match=expected):
        module(root, "voc", classes=["rbc"])


def test_missing_files_of_voc_are_named(voc: Write, tmp_path: Path) -> None:
    root = voc(a=[])
    (root / "Annotations/a.xml").unlink()
    with pytest.raises(UserError, match=r"cannot read the annotation .*a\.xml"):
        module(root, "voc")
    with pytest.raises(UserError, match=r"test\.txt does not exist; the splits there: train, val"):
        module(root, "voc", test_split="test")
    (root / "ImageSets/Main/val.txt").write_text("\n")
    with pytest.raises(UserError, match=r"val\.txt lists no image"):
        module(root, "voc")
    with pytest.raises(UserError, match=r"does not have Pascal VOC's layout"):
        module(tmp_path / "voc" / "JPEGImages", "voc")


@pytest.mark.parametrize("value", [" 1 ", "true", "True", "yes", "1.0"])
def test_difficult_in_any_spelling(voc: Write, value: str) -> None:
    objects = [voc_object("rbc", 1, 1, 9, 9, difficult=value), voc_object("rbc", 1, 1, 9, 9, difficult=" 0 ")]
    objects.append(
        "<object><name>rbc</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
    )
    (batch,) = module(voc(a=objects), "voc").test_dataloader()
    assert batch["objects"][0]["iscrowd"].tolist() == [True, False, False]


def test_voc_with_a_namespace(voc: Write) -> None:
    root = voc(a=[])
    write_xml(root, f'<annotation xmlns="urn:voc">{voc_object("rbc", 1, 2, 30, 40)}</annotation>')
    (batch,) = module(root, "voc").test_dataloader()
    assert batch["objects"][0]["boxes"].tolist() == [[1, 2, 30, 40]]


def test_blanks_around_names_and_values(voc: Write) -> None:
    root = voc(a=[voc_object("rbc ", " 10", "20\n", 40, 35), voc_object("\trbc", 0, 0, 5, 6)])
    data = module(root, "voc")
    assert data.class_names == ("rbc",)
    (batch,) = data.test_dataloader()
    assert batch["objects"][0]["boxes"].tolist() == [[10, 20, 40, 35], [0, 0, 5, 6]]


@pytest.mark.parametrize("ending", ["JPG", "jpeg", "png", "webp"])
def test_voc_images_of_other_formats(voc: Write, ending: str) -> None:
    root = voc(a=[voc_object("rbc", 10, 20, 40, 35)])
    Image.open(root / "JPEGImages/a.jpg").save(root / f"JPEGImages/other.{ending}")
    (root / "JPEGImages/a.jpg").unlink()
    (root / f"JPEGImages/other.{ending}").rename(root / f"JPEGImages/a.{ending}")
    (batch,) = module(root, "voc").test_dataloader()
    assert (list(batch["id"]), batch["original_size"]) == (["a"], [SIZE])


LISTS: dict[str, tuple[bytes, list[str]]] = {
    "names with blanks": (b"my image\nimage 1\n", ["my image", "image 1"]),
    "of one class": (b"a -1\n c  1\nimage 1 0\n", ["a", "c", "image 1"]),
    "byte order mark": (b"\xef\xbb\xbfa\r\nc\r\n", ["a", "c"]),
    "UTF-16": ("a\nc\n".encode("utf-16"), ["a", "c"]),
    "UTF-8": ("é\na".encode(), ["é", "a"]),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_voc(voc: Write, name: str) -> None:
    objects = [voc_object("rbc", 1, 1, 9, 9)]
    root = voc(**dict.fromkeys(("a", "c", "my image", "image 1", "é"), objects))
    content, expected = LISTS[name]
    (root / "ImageSets/Main/val.txt").write_bytes(content)
    batches = module(root, "voc").test_dataloader()
    assert [id for batch in batches for id in batch["id"]] == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("é\n".encode("latin-1"), r"val\.txt, line 1 lists an image without an annotation.*save the list as UTF-8"),
        ("a\nc\n".encode("utf-16-le"), r"val\.txt, line 1 is not text, or not UTF-8"),
        (b"\xff\xfea", r"val\.txt is not UTF-16"),
        (b"a\n../a\n", r"val\.txt, line 2: the file name '\.\./a' leads out of the dataset's folder"),
        (b"a\n\na\n", r"val\.txt lists the image 'a' more than once"),
        (b"a\n./a\n", r"val\.txt lists the image 'a' more than once"),
        (b"/etc/passwd\n", r"val\.txt, line 1: the file name '/etc/passwd' leads out"),
        (b"a" * 5000, r"cannot read the annotation .*File name too long"),
    ],
)
def test_lists_of_voc_that_are_wrong(voc: Write, content: bytes, expected: str) -> None:
    root = voc(a=[], é=[])
    (root / "ImageSets/Main/val.txt").write_bytes(content)
    with pytest.raises(UserError, match=expected):
        module(root, "voc", classes=["rbc"])


XML = "<?xml version='1.0' encoding='{}'?><annotation>" + voc_object("猫", 1, 2, 3, 4) + "</annotation>"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gbk", "euc-kr"])
def test_encodings_of_xml(voc: Write, encoding: str) -> None:
    root = voc(a=[])
    name = "猫" if encoding != "euc-kr" else "개"
    declared = {"utf-8-sig": "utf-8"}.get(encoding, encoding)
    (root / "Annotations/a.xml").write_bytes(XML.format(declared).replace("猫", name).encode(encoding))
    assert module(root, "voc").class_names == (name,)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (XML.format("foo").encode(), r"a\.xml is not valid XML: unknown encoding: foo"),
        (XML.format("zlib").encode(), r"a\.xml is not valid XML"),
        (XML.format("ascii").encode(), r"a\.xml, line 1 is not ascii: save it as UTF-8"),
        (b"<annotation>\n<object><name>caf\xe9</name></object></annotation>", r"a\.xml, line 2 is not utf-8"),
        (
            b"<!DOCTYPE a [<!ENTITY x 'xxxxxxxxxx'>" + b"".join(
                b"<!ENTITY %s '%s'>" % (new, (b"&%s;" % old) * 10)
                for old, new in zip(b"x a b c d e f g".split(), b"a b c d e f g h".split(), strict=True)
            ) + b"]><a>&h;</a>",
            r"a\.xml is not valid XML",
        ),
        (voc_object("rbc", 1, 2, 3, 4, difficult="perhaps").encode(), r"object 0: difficult 'perhaps' is neither"),
        (voc_object("rbc", 1, 2, "1e39", 4).encode(), r"right 1e\+39, bottom 4 is invalid.*up to 16777216"),
    ],
)  # fmt: skip
def test_xml_that_cannot_be_read(voc: Write, content: bytes, expected: str) -> None:
    root = voc(a=[])
    (root / "Annotations/a.xml").write_bytes(content)
    with pytest.raises(UserError, match=expected):
        module(root, "voc", classes=["rbc"])


def test_a_stated_size_of_voc_has_to_be_the_images(voc: Write) -> None:
    def size(height: int, width: int) -> str:
        return f"<size><width>{width}</width><height>{height}</height></size>"

    for stated in (size(*SIZE), size(0, 0), ""):
        assert list(module(voc(a=[stated, voc_object("rbc", 1, 2, 3, 4)]), "voc").test_dataloader())
    with pytest.raises(UserError, match=r"annotation of image a of .* states 60 x 100 pixels, the image has 100 x 60"):
        list(module(voc(a=[size(100, 60), voc_object("rbc", 1, 2, 3, 4)]), "voc").test_dataloader())


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (coco_object(bbox=[10**400, 2, 3, 4]), r"cannot read the annotation .*too large"),
        (coco_object(bbox=[1e39, 2, 3, 4]), r"left 1e\+39.* is invalid"),
        (coco_object(iscrowd="perhaps"), r"cannot read the annotation .*neither 0 nor 1"),
        (coco_object(category=5), r"unknown category_id in .*'5'. Available: 18, 90"),
        (coco_object(image=8), r"annotation 1 refers to image 8, which is not in the file"),
        (coco_object(bbox=[1, 2, -3, 4]), r"annotation 1: the box left 1, top 2, right -2, bottom 6 is invalid"),
        (coco_object(bbox=[1, 2, 3]), r"cannot read the annotation .*bbox, four numbers"),
        (coco_object(bbox=["a", 2, 3, 4]), r"cannot read the annotation"),
        (coco_object(bbox=[True, 2, 3, 4]), r"cannot read the annotation"),
        (coco_object(bbox="1234"), r"cannot read the annotation"),
        (coco_object(image="7"), r"annotation 1 refers to image '7', which is not in the file"),
        (coco_object(image=None), r"annotation 1 refers to image None"),
        ({"bbox": [1, 2, 3, 4]}, r"cannot read the annotation .*image_id"),
        ("text", r"cannot read the annotation"),
        (coco_object(image=[7]), r"cannot read the annotation|is of image"),
    ],
)
def test_a_wrong_annotation_of_coco_is_named(coco: Write, annotation: Any, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        module(coco([annotation]), "coco")


def test_wrong_files_of_coco_are_named(coco: Write) -> None:
    root = coco([])
    file = root / "annotations/instances_val.json"
    for content, expected in (
        ("{", "not valid JSON"),
        ("[]", "are not in COCO's format"),
        ('{"images": [{}], "categories": [], "annotations": []}', "are not in COCO's format"),
        ('{"images":' + "[" * 200_000, "not valid JSON"),
        ('{"images": [{"id": ' + "9" * 5000 + "}]}", "not valid JSON"),
        ('{"images": [], "categories": [], "annotations": []}', "list no image"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=rf"instances_val\.json.*{expected}"):
            module(root, "coco")
    file.unlink()
    with pytest.raises(UserError, match=r"cannot read the annotations .*instances_val\.json"):
        module(root, "coco")
    with pytest.raises(UserError, match="unknown class in .*'dog'"):
        module(coco([coco_object()]), "coco", classes=["cat"])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"images": [{"id": 7, "file_name": "x.jpg"}, {"id": 7, "file_name": "y.jpg"}]}, "two images have the id 7"),
        ({"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat "}]}, "categories 1, 2 are all called 'cat'"),
        ({"categories": [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]}, "two categories have the id 1"),
        ({"categories": [{"id": 1, "name": None}]}, r"COCO's format: .*a category is called None"),
        ({"categories": None}, "categories is null, expected a list"),
        ({"annotations": None}, "annotations is null, expected a list"),
        ({"annotations": {}}, "annotations is a value of type dict, expected a list"),
        ({"images": [{"id": None, "file_name": "x.jpg"}]}, "one of images has the id None, expected a whole number"),
        ({"images": [{"id": True, "file_name": "x.jpg"}]}, "one of images has the id True"),
        ({"categories": [{"id": None, "name": "cat"}]}, "one of categories has the id None"),
        ({"images": [{"id": 7, "file_name": "x.jpg"}, {"id": 8, "file_name": "./x.jpg"}]}, "'x.jpg' more than once"),
        ({"images": [{"id": 7, "file_name": "../y.jpg"}]}, r"image 7: the file name '\.\./y\.jpg' leads out"),
        ({"images": [{"id": 7, "file_name": "/etc/passwd"}]}, "image 7: the file name '/etc/passwd' leads out"),
        ({"images": [{"id": 7, "file_name": "a\\..\\y.jpg"}]}, "leads out of the dataset's folder"),
        ({"images": [{"id": 7, "file_name": None}]}, "image 7 has the file_name None, expected text"),
    ],
)
def test_wrong_lists_of_coco_are_named(coco: Write, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=rf"instances_val\.json.*{expected}"):
        module(coco(**{"annotations": [], **changes}), "coco")


def test_a_crowd_may_be_a_text(coco: Write) -> None:
    data = module(coco([coco_object(iscrowd="0"), coco_object(iscrowd="1")]), "coco")
    assert next(iter(data.test_dataloader()))["objects"][1]["iscrowd"].tolist() == [False, True]


WRONG_RUNS = [{"size": list(SIZE), "counts": counts} for counts in ("\x00", "PPP", "o" * 40, "é", [-1, 6001], "")]


@pytest.mark.parametrize("segmentation", [*WRONG_RUNS, [[1e30] * 6], [[0, 0, 1e9, 0, 1e9, 1e9]], []])
def test_an_outline_that_would_crash_the_library_is_named(coco: Write, segmentation: Any) -> None:
    data = module(coco([coco_object(segmentation=segmentation)]), "coco", masks=True)
    with pytest.raises(UserError, match=r"image x\.jpg of .*segmentation is invalid"):
        list(data.test_dataloader())


def test_run_lengths_as_text(coco: Write) -> None:
    from faster_coco_eval.core import mask as coco_masks

    expected = np.zeros(SIZE, np.uint8)
    expected[7:40, 3:90:7] = 1
    runs = coco_masks.encode(np.asfortranarray(expected))
    runs["counts"] = runs["counts"].decode() if isinstance(runs["counts"], bytes) else runs["counts"]
    data = module(coco([coco_object(segmentation=runs)]), "coco", masks=True)
    assert np.array_equal(next(iter(data.test_dataloader()))["objects"][1]["masks"][0].numpy(), expected)


@pytest.mark.parametrize("segmentation", [None, [[1, 2]], "junk", {"size": [3, 3], "counts": [0, 9]}, [["a", "b"]]])
def test_an_outline_that_is_none_is_named(coco: Write, segmentation: Any) -> None:
    data = module(coco([coco_object(segmentation=segmentation)]), "coco", masks=True)
    with pytest.raises(UserError, match=r"image x\.jpg of .*segmentation is invalid"):
        list(data.test_dataloader())


def test_a_box_beyond_the_image_is_named(coco: Write) -> None:
    with pytest.raises(UserError, match=re.escape("a box lies outside its 100 x 60 pixels")):
        list(module(coco([coco_object(bbox=[200, 5, 10, 10])]), "coco").test_dataloader())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"source": "yolo"}, r"unknown dataset\.source 'yolo'"),
        ({"masks": True}, r"dataset\.source=voc has boxes only"),
        ({"train_transform": {"scale": [1, 1]}}, r"train_transform=.*: expected color_jitter, scale, turns"),
        ({"train_transform": {"scale": [2, 1], "turns": True, "color_jitter": 0}}, r"least factor before the largest"),
        ({"train_transform": {"scale": 1, "turns": True, "color_jitter": 0}}, r"expected two factors"),
        ({"train_transform": {"scale": [1, 1], "turns": 1, "color_jitter": 0}}, r"turns=1: expected true or false"),
        ({"model_classes": ["wbc"], "num_classes": 1}, r"not among the model's"),
    ],
)
def test_options_that_cannot_be(voc: Write, options: dict[str, Any], expected: str) -> None:
    root = voc(a=[voc_object("rbc", 1, 1, 9, 9)])
    with pytest.raises(UserError, match=expected):
        module(root, **{"source": "voc", **options})
