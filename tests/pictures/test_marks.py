"""A sheet is the same in pixels and as SVG; what a picture says of detections."""

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from mtr_lab.pictures.detection import Boxes, found_objects
from mtr_lab.pictures.marks import INK, Frame, Sheet, Text
from mtr_lab.pictures.observation import BlockView
from mtr_lab.pictures.page import label, page
from mtr_lab.pictures.panels import size_panel, token_panel, viridis
from mtr_lab.pictures.regions import DROPPED, PatchGrid
from mtr_lab.results.average_precision import match_images

SVG = "{http://www.w3.org/2000/svg}"


def test_the_svg_has_the_words_and_images_of_the_sheet() -> None:
    panel = Image.new("RGB", (40, 30), (0, 0, 255))
    sheet = page("a < b & c", [[label("one", "small\nprint"), label("two")], [panel, panel]], "note", [("sky", INK)])
    root = ElementTree.fromstring(sheet.svg())
    assert (int(root.attrib["width"]), int(root.attrib["height"])) == sheet.size == sheet.image().size
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts == ["a < b & c", "one", "small", "print", "two", "sky", "note"]
    first, second = root.iter(f"{SVG}image")
    assert Image.open(io.BytesIO(sheet._repr_png_())).size == sheet.size  # in a notebook
    assert repr(sheet) == f"Sheet({sheet.width} × {sheet.height} px, 10 marks)"
    pixels = np.asarray(sheet.image())
    for image in (first, second):
        assert pixels[int(image.attrib["y"]), int(image.attrib["x"])].tolist() == [0, 0, 255]
    assert float(second.attrib["x"]) >= float(first.attrib["x"]) + 40


@pytest.mark.parametrize("dashed", [False, True])
def test_a_frame_keeps_to_its_place(dashed: bool) -> None:
    grey = Image.new("RGB", (80, 60), (128, 128, 128))
    sheet = Sheet(80, 60, ((0, 0, grey), (10, 20, Frame(50, 30, (255, 0, 0), dashed=dashed))))
    red = (np.asarray(sheet.image()) == (255, 0, 0)).all(-1)
    rows, columns = np.nonzero(red)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 50, 10, 60)
    assert not red[24:46, 14:56].any()
    assert red[20, 10:61].all() != dashed
    assert ("stroke-dasharray" in sheet.svg()) == dashed


def test_a_halo_separates_words_from_an_image() -> None:
    black = Image.new("RGB", (60, 30))
    plain, halo = (Sheet(60, 30, ((0, 0, black), (9, 5, Text("sky", 16, halo=halo)))) for halo in (False, True))
    assert np.asarray(plain.image()).max() < 60 < np.asarray(halo.image()).max()
    assert ("paint-order" in halo.svg(), "paint-order" in plain.svg()) == (True, False)


def boxes(*rows: tuple[float, ...]) -> Boxes:
    table = np.array(rows, float).reshape(-1, 6)
    return Boxes(table[:, :4], table[:, 4].astype(int), table[:, 5])


def test_the_objects_that_detections_find() -> None:
    truth = boxes((0, 0, 10, 10, 0, 1), (20, 0, 30, 10, 1, 1), (40, 0, 50, 10, 0, 1))
    detected = boxes(
        (0, 0, 10, 8, 0, 0.6),  # the first object, which the next has found
        (0, 0, 10, 9, 0, 0.9),
        (20, 0, 30, 10, 0, 0.8),  # of another class
        (46, 0, 56, 10, 0, 0.7),  # overlaps too little
    )
    assert found_objects(detected, truth).tolist() == [-1, 0, -1, -1]
    assert found_objects(detected, boxes()).tolist() == [-1] * 4
    assert found_objects(boxes(), truth).tolist() == []


def test_right_boxes_are_those_of_average_precision() -> None:
    random = np.random.default_rng(0)
    corners, sizes = random.integers(0, 30, (2, 40, 2)), random.integers(8, 20, (2, 40, 2))
    labels, scores = random.integers(0, 2, (2, 40)), random.permutation(40) / 40
    both = [np.concatenate([corners[i], corners[i] + sizes[i]], 1).astype(float) for i in (0, 1)]
    detected, truth = Boxes(both[0], labels[0], scores), Boxes(both[1][:15], labels[1][:15], np.ones(15))

    def as_coco(objects: Boxes) -> dict[str, np.ndarray]:
        shapes = np.concatenate([objects.boxes[:, :2], objects.boxes[:, 2:] - objects.boxes[:, :2]], 1)
        crowd = np.zeros(len(shapes), bool)
        return {**objects._asdict(), "shapes": shapes, "iscrowd": crowd}

    matches = match_images([as_coco(detected)], [as_coco(truth)], 2)
    right = dict(zip(matches.score.tolist(), matches.hits[:, 0] == 1, strict=True))
    found = found_objects(detected, truth)
    assert 3 < (found >= 0).sum() < 15
    assert [right[float(score)] for score in scores] == (found >= 0).tolist()


def test_how_many_patches_a_token_stands_for() -> None:
    source = np.array([[0, 0, 0, 0], [1, 1, 2, DROPPED]])
    view = BlockView(PatchGrid(2, 4, 10, 10), 8, 8, 3, source, np.zeros((2, 4), bool), None)
    panel = np.asarray(size_panel(view, 1))
    colours = viridis(np.array([1.0, 0.5, 0.0])).round().tolist()
    assert [panel[5, 5].tolist(), panel[15, 5].tolist(), panel[15, 25].tolist()] == colours
    assert panel[15, 35].tolist() not in colours


def test_many_regions_have_thin_outlines() -> None:
    """Bright ones of 268 tokens of 2 701 hid the image."""

    def contrast(side: int) -> float:
        source = np.arange(side * side).reshape(side, side) // 2
        view = BlockView(PatchGrid(side, side, 6, 6), 0, 0, 0, source, np.zeros((side, side), bool), None)
        image = np.full((6 * side, 6 * side, 3), 60, np.uint8)
        return float(np.asarray(token_panel(image, view, 1)).max()) - 60

    assert contrast(30) < 0.4 * contrast(10)
