"""Pictures of segmentations: the label maps at several operating points, and the tokens that survive."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from mtr_lab.pictures.observation import Observation
from mtr_lab.pictures.page import label, page
from mtr_lab.pictures.palette import class_colours
from mtr_lab.pictures.panels import INK, PAPER, font, token_panel
from mtr_lab.pictures.sheets import TOKENS, percent, title

_OPACITY = 0.6
_NAMED_SHARE = 0.01
"""Classes that cover a smaller share of the image get no name in it."""
IGNORED = 255
"""In a map of truths: the pixel is not counted."""
_UNKNOWN = (128, 128, 128)
_LOST, _WON, _OTHER = (213, 94, 0), (0, 114, 178), (240, 228, 66)  # Okabe and Ito: apart for all readers


def label_panel(image: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """An image (H, W, 3) uint8, blended with the colours of its labels (H, W); large classes are named.

    Pixels without a class, ``IGNORED``, are grey.
    """
    colours = np.concatenate([class_colours(len(classes)), [_UNKNOWN]])
    coloured = colours[np.minimum(labels, len(classes))]
    panel = Image.fromarray(((1 - _OPACITY) * image + _OPACITY * coloured).astype(np.uint8))
    draw = ImageDraw.Draw(panel)
    for c in np.unique(labels[labels != IGNORED]):
        rows, columns = np.nonzero(labels == c)
        if len(rows) < _NAMED_SHARE * labels.size:
            continue
        # The name is centred on the pixel of the class nearest to the class's centre.
        middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
        centre = (int(columns[middle]), int(rows[middle]))
        draw.text(centre, classes[c], fill=INK, font=font(14), anchor="mm", stroke_width=2, stroke_fill=PAPER)
    return panel


def change_panel(image: np.ndarray, before: np.ndarray, after: np.ndarray, truth: np.ndarray | None) -> Image.Image:
    """The image in grey; pixels that change their label are coloured by whether they were or become right."""
    panel = np.repeat(image.mean(-1, keepdims=True) * 0.5 + 110, 3, -1)
    changed = before != after
    panel[changed] = _OTHER
    if truth is not None:
        panel[changed & (before == truth)] = _LOST
        panel[changed & (after == truth)] = _WON
    return Image.fromarray(panel.clip(0, 255).astype(np.uint8))


def segmentation_sheet(
    observation: Observation,
    label_maps: Mapping[str, np.ndarray],
    classes: Sequence[str],
    truth: np.ndarray | None = None,
) -> Image.Image:
    """The input, the truth, the label maps, what changes, and the surviving tokens after the last block.

    Args:
        observation: the image, processed under one policy.
        label_maps: heading -> labels (H, W) int64 of the image; the first is the unreduced model's.
        classes: names in label order; the legend has all of them.
        truth: the annotated labels (H, W), ``IGNORED`` where there is none.
    """
    headings, panels = [label("input")], [Image.fromarray(observation.image)]
    if truth is not None:
        headings.append(label("truth"))
        panels.append(label_panel(observation.image, truth, classes))
    (first_name, first), *others = label_maps.items()
    headings.append(label(first_name, _accuracy(first, truth)))
    panels.append(label_panel(observation.image, first, classes))
    key = [*zip(classes, map(tuple, class_colours(len(classes)).tolist()), strict=True)]
    for name, labels in others:
        headings += [
            label(name, _accuracy(labels, truth)),
            label(f"{np.mean(labels != first):.1%} of the pixels change"),
        ]
        panels += [
            label_panel(observation.image, labels, classes),
            change_panel(observation.image, first, labels, truth),
        ]
    if others:
        verdicts = [("was right", _LOST), ("becomes right", _WON)] if truth is not None else []
        key += [*verdicts, ("changes, wrong in both" if verdicts else "changes", _OTHER)]
    last = observation.blocks[-1]
    headings.append(label("surviving tokens", f"{percent(observation)} of FLOPs removed, {last.tokens} tokens left"))
    panels.append(token_panel(observation.image, last, 1))
    return page(title(observation), [headings, panels], TOKENS, key)


def _accuracy(labels: np.ndarray, truth: np.ndarray | None) -> str:
    if truth is None or (truth == IGNORED).all():
        return ""
    counted = truth != IGNORED
    return f"{np.mean(labels[counted] == truth[counted]):.1%} of the pixels are right"
