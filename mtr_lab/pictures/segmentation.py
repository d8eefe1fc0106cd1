"""Pictures of segmentations: the class of every pixel at several operating points, and the tokens it is found with."""

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
"""Of the image: a class that covers less is not named in it."""
_GOLDEN = (5**0.5 - 1) / 2
"""Of a turn, between the hues of neighbouring classes: so they are far apart, however many there are."""


def class_colours(count: int) -> np.ndarray:
    """A colour for each class, (count, 3) uint8."""
    colours = [hsv_to_rgb(i * _GOLDEN % 1, 0.75, (0.95, 0.7)[i % 2]) for i in range(count)]
    return (255 * np.array(colours)).astype(np.uint8)


def label_panel(image: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """An image (H, W, 3) uint8 under the colours of its labels (H, W) int64, with the names of the larger classes."""
    coloured = class_colours(len(classes))[labels]
    panel = Image.fromarray(((1 - _OPACITY) * image + _OPACITY * coloured).astype(np.uint8))
    draw = ImageDraw.Draw(panel)
    for c in np.unique(labels):
        rows, columns = np.nonzero(labels == c)
        if len(rows) < _NAMED_SHARE * labels.size:
            continue
        # The name stands on the pixel of the class that is nearest to the middle of them all.
        middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
        centre = (int(columns[middle]), int(rows[middle]))
        draw.text(centre, classes[c], fill=INK, font=font(14), anchor="mm", stroke_width=2, stroke_fill=PAPER)
    return panel


def segmentation_sheet(
    observation: Observation, label_maps: Mapping[str, np.ndarray], classes: Sequence[str]
) -> Image.Image:
    """The input, the classes at each operating point, and the tokens left after the last block of the observed one.

    Args:
        observation: the image under the policy that is drawn.
        label_maps: by the point's name the labels (H, W) int64 of the observed image.
        classes: their names.
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
