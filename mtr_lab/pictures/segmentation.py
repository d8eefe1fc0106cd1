"""Pictures of segmentations: the label maps at several operating points, and the tokens that survive."""

from collections.abc import Mapping, Sequence
from colorsys import hsv_to_rgb

import numpy as np
from PIL import Image, ImageDraw

from mtr_lab.pictures.observation import Observation
from mtr_lab.pictures.page import label, page
from mtr_lab.pictures.panels import INK, PAPER, font, token_panel
from mtr_lab.pictures.sheets import TOKENS, percent, title

_OPACITY = 0.6
_NAMED_SHARE = 0.01
"""Classes that cover a smaller share of the image get no name in it."""
_GOLDEN = (5**0.5 - 1) / 2
"""Step of the hue from class to class, the golden ratio: any number of hues are far apart."""


def class_colours(count: int) -> np.ndarray:
    """One colour per class, (count, 3) uint8."""
    colours = [hsv_to_rgb(i * _GOLDEN % 1, 0.75, (0.95, 0.7)[i % 2]) for i in range(count)]
    return (255 * np.array(colours)).astype(np.uint8)


def label_panel(image: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """An image (H, W, 3) uint8, blended with the colours of its labels (H, W) int64; large classes are named."""
    coloured = class_colours(len(classes))[labels]
    panel = Image.fromarray(((1 - _OPACITY) * image + _OPACITY * coloured).astype(np.uint8))
    draw = ImageDraw.Draw(panel)
    for c in np.unique(labels):
        rows, columns = np.nonzero(labels == c)
        if len(rows) < _NAMED_SHARE * labels.size:
            continue
        # The name is centred on the pixel of the class nearest to the class's centre.
        middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
        centre = (int(columns[middle]), int(rows[middle]))
        draw.text(centre, classes[c], fill=INK, font=font(14), anchor="mm", stroke_width=2, stroke_fill=PAPER)
    return panel


def segmentation_sheet(
    observation: Observation, label_maps: Mapping[str, np.ndarray], classes: Sequence[str]
) -> Image.Image:
    """The input, the label maps at each operating point, and the tokens after the last block of the observed model.

    Args:
        observation: the image, processed under one policy.
        label_maps: name of the point -> labels (H, W) int64 of the image; the first point is the unreduced model.
        classes: names in label order.
    """
    headings, panels = [label("input")], [Image.fromarray(observation.image)]
    first = next(iter(label_maps.values()))
    for name, labels in label_maps.items():
        changed = f"{np.mean(labels != first):.1%} of the pixels changed" if labels is not first else "unreduced"
        headings.append(label(name, changed))
        panels.append(label_panel(observation.image, labels, classes))
    last = observation.blocks[-1]
    headings.append(label("surviving tokens", f"{percent(observation)} of FLOPs removed, {last.tokens} tokens left"))
    panels.append(token_panel(observation.image, last, 1))
    return page(title(observation), [headings, panels], TOKENS)
