"""Pictures of segmentations: the label maps at two operating points, beside the truth and the surviving tokens."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from mtr_lab.pictures.marks import Sheet, Text
from mtr_lab.pictures.observation import Observation
from mtr_lab.pictures.page import label, page
from mtr_lab.pictures.palette import LOST, OTHER, WON, class_colours
from mtr_lab.pictures.panels import faint_panel, image_panel
from mtr_lab.pictures.sheets import SCORES, TOKENS, dense_rows, dense_scale, title

_OPACITY = 0.6
_NAMED_SHARE = 0.01
"""Classes that cover a smaller share of the image get no name in it."""
_NAME_SIZE = 16  # font size in pixels
IGNORED = 255
"""In a map of truths: the pixel is not counted."""
_UNKNOWN = (128, 128, 128)


def label_panel(image: np.ndarray, labels: np.ndarray, classes: Sequence[str], scale: int) -> Sheet:
    """An image (H, W, 3) uint8, blended with the colours of its labels (H, W) and enlarged; large classes are named.

    Pixels without a class, ``IGNORED``, are grey.
    """
    colours = np.concatenate([class_colours(len(classes)), [_UNKNOWN]])
    coloured = colours[np.minimum(labels, len(classes))].repeat(scale, 0).repeat(scale, 1)
    blended = ((1 - _OPACITY) * np.asarray(image_panel(image, scale)) + _OPACITY * coloured).astype(np.uint8)
    names = []
    for c in np.unique(labels[labels != IGNORED]):
        rows, columns = np.nonzero(labels == c)
        if len(rows) < _NAMED_SHARE * labels.size:
            continue
        # The name is centred on the pixel of the class nearest to the class's centre, and inside the image.
        middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
        name = Text(classes[c], _NAME_SIZE, halo=True)
        left = np.clip(scale * columns[middle] - name.width / 2, 0, max(blended.shape[1] - name.width, 0))
        names.append((float(left), float(scale * rows[middle] - _NAME_SIZE / 2), name))
    return Sheet(blended.shape[1], blended.shape[0], ((0, 0, Image.fromarray(blended)), *names))


def change_panel(
    image: np.ndarray, before: np.ndarray, after: np.ndarray, truth: np.ndarray | None, scale: int = 1
) -> Image.Image:
    """The image in grey; pixels that change their label are coloured by whether they were or become right."""
    before, after = (labels.repeat(scale, 0).repeat(scale, 1) for labels in (before, after))
    panel = np.array(faint_panel(image, scale))
    changed = before != after
    panel[changed] = OTHER
    if truth is not None:
        truth = truth.repeat(scale, 0).repeat(scale, 1)
        panel[changed & (before == truth)] = LOST
        panel[changed & (after == truth)] = WON
    return Image.fromarray(panel)


def segmentation_sheet(
    observation: Observation,
    label_maps: Mapping[str, np.ndarray],
    classes: Sequence[str],
    truth: np.ndarray,
) -> Sheet:
    """The input, the truth and the surviving tokens; below, the label maps at two points, and what changes.

    Args:
        observation: the image, processed under one policy.
        label_maps: heading -> labels (H, W) int64 of the image; the unreduced model's, and the reduced model's.
        classes: names in label order; the legend has all of them.
        truth: the annotated labels (H, W), ``IGNORED`` where there is none.
    """
    (first, before), (second, after) = label_maps.items()
    image, scale = observation.image, dense_scale(observation)
    rows = dense_rows(
        observation,
        [
            (label("input"), image_panel(image, scale)),
            (label("truth", _classes(truth, classes)), label_panel(image, truth, classes, scale)),
        ],
        [
            (label(first, _accuracy(before, truth)), label_panel(image, before, classes, scale)),
            (label(second, _accuracy(after, truth)), label_panel(image, after, classes, scale)),
            (
                label("what changes", f"{100 * np.mean(before != after):.1f} % of the pixels"),
                change_panel(image, before, after, truth, scale),
            ),
        ],
    )
    colours = [(red, green, blue) for red, green, blue in class_colours(len(classes)).tolist()]
    verdicts = [("was right", LOST), ("becomes right", WON), ("changes, wrong in both", OTHER)]
    key = [*zip(classes, colours, strict=True), *verdicts]
    return page(title(observation), rows, f"{TOKENS}  ·  {SCORES}", key)


def _classes(truth: np.ndarray, classes: Sequence[str]) -> str:
    count = len(np.unique(truth[truth != IGNORED]))
    return f"{count} of {len(classes)} classes" if count else "no annotation"


def _accuracy(labels: np.ndarray, truth: np.ndarray) -> str:
    counted = truth != IGNORED
    return f"{100 * np.mean(labels[counted] == truth[counted]):.1f} % of the pixels are right" if counted.any() else ""
