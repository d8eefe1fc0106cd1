"""The colours of classes, as readers with red-green blindness see them; what a picture says of a segmentation."""

import numpy as np
import pytest
import torch
from PIL import Image

from mtr_lab.data.segmentation.label_maps import IGNORE
from mtr_lab.data.segmentation.transforms import Windows, first_window
from mtr_lab.pictures.page import legend
from mtr_lab.pictures.palette import class_colours
from mtr_lab.pictures.segmentation import IGNORED, change_panel

# Linear RGB as a dichromat sees it: Viénot, Brettel, Mollon, "Digital video colourmaps for checking the legibility of
# displays by dichromats", 1999. The palette was chosen by another model.
DEUTERANOPIA = [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]
PROTANOPIA = [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]


def delta_e(colours: np.ndarray, vision: np.ndarray) -> float:
    """The least CIE76 difference between two of the colours, computed by Pillow's profile of sRGB."""
    from PIL import ImageCms

    values = colours / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4) @ vision.T
    linear = linear.clip(0, 1)
    seen = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    image = Image.fromarray((255 * seen).round().astype(np.uint8)[None])
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = np.asarray(ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB")))[0]
    signed = np.stack([lab[:, 0] / 2.55, lab[:, 1].astype(np.int8), lab[:, 2].astype(np.int8)], -1)
    distances = np.linalg.norm(signed[:, None] - signed[None], axis=-1)
    return float(distances[~np.eye(len(colours), dtype=bool)].min())


@pytest.mark.parametrize("vision", [np.eye(3), DEUTERANOPIA, PROTANOPIA], ids=["all", "deuteranopia", "protanopia"])
@pytest.mark.parametrize(("count", "least"), [(11, 15), (21, 8)])
def test_classes_differ_for_every_reader(vision: list[list[float]], count: int, least: float) -> None:
    """CamVid's sky and fence once differed by 2.5."""
    assert delta_e(class_colours(count), np.array(vision)) > least


def test_the_first_colours_are_the_same_for_any_number() -> None:
    assert np.array_equal(class_colours(150)[:11], class_colours(11))
    assert len(np.unique(class_colours(150), axis=0)) == 150


def test_what_changes_is_coloured_by_its_truth() -> None:
    image = np.full((1, 5, 3), 100, np.uint8)
    truth = np.array([[0, 0, 0, IGNORED, 0]])
    before, after = np.array([[0, 1, 1, 1, 0]]), np.array([[1, 0, 2, 2, 0]])
    lost, won, other, uncounted, same = np.asarray(change_panel(image, before, after, truth))[0].tolist()
    assert len({tuple(colour) for colour in (lost, won, other, same)}) == 4
    assert uncounted == other
    assert np.asarray(change_panel(image, before, after, None))[0, 0].tolist() == other
    assert IGNORED == IGNORE


def test_a_legend_breaks_its_lines() -> None:
    entries = [(f"class {number}", (number, 0, 0)) for number in range(20)]
    wide, narrow = legend(entries, 3000), legend(entries, 300)
    assert narrow.width <= 300
    assert narrow.height > 3 * wide.height


@pytest.mark.parametrize(("slide", "shape"), [(False, (40, 60)), (False, (60, 40)), (True, (40, 200))])
def test_the_truth_of_the_first_window(slide: bool, shape: tuple[int, int]) -> None:
    height, width = shape
    labels = (8 * torch.arange(height)[:, None] // height + 8 * torch.arange(width) // width).to(torch.uint8)
    image = labels[None].float().repeat(3, 1, 1)
    windows, _, size = Windows((32, 48), slide)(image)
    truth = first_window(labels, size, (32, 48))
    assert truth.shape == (32, 48)
    inside = truth != IGNORE
    assert inside.sum() == min(size[0], 32) * min(size[1], 48)
    assert np.abs(windows[0, 0].numpy() - truth)[inside].mean() < 0.15  # equal but at edges
