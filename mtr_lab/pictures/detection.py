"""Pictures of detections: the boxes at several operating points, and the tokens that survive the reduction."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from mtr_lab.pictures.observation import Observation
from mtr_lab.pictures.page import label, page
from mtr_lab.pictures.panels import token_panel
from mtr_lab.pictures.sheets import TOKENS, percent, title

MIN_SCORE = 0.5
"""Boxes with a lower score are not drawn."""
_COLOURS = ((225, 29, 72), (37, 99, 235), (22, 163, 74), (217, 119, 6), (124, 58, 237), (8, 145, 178))


def box_panel(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> Image.Image:
    """An image (H, W, 3) uint8 with boxes (m, 4) (left, top, right, bottom, in pixels), coloured by class."""
    panel = Image.fromarray(image)
    draw = ImageDraw.Draw(panel)
    for box, class_index in zip(boxes.tolist(), labels.tolist(), strict=True):
        draw.rectangle(box, outline=_colour(class_index), width=2)
    return panel


def _colour(class_index: int) -> tuple[int, int, int]:
    return _COLOURS[class_index % len(_COLOURS)]


def detection_sheet(
    observation: Observation,
    detections: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    classes: Sequence[str],
) -> Image.Image:
    """The input, the boxes at each operating point, and the tokens after the last block of the observed model.

    Args:
        observation: the image, processed under one policy.
        detections: name of the point -> boxes (m, 4) in pixels of the image, scores (m,) and labels (m,).
        classes: names in label order.
    """
    headings, panels = [label("input")], [Image.fromarray(observation.image)]
    for name, (boxes, scores, labels) in detections.items():
        shown = scores >= MIN_SCORE
        counts = np.bincount(labels[shown], minlength=len(classes))
        key = [(f"{count} {classes[c]}", _colour(c)) for c, count in enumerate(counts) if count]
        headings.append(label(name, "" if key else "no boxes", key=key))
        panels.append(box_panel(observation.image, boxes[shown], labels[shown]))
    last = observation.blocks[-1]
    headings.append(label("surviving tokens", f"{percent(observation)} of FLOPs removed, {last.tokens} tokens left"))
    panels.append(token_panel(observation.image, last, 1))
    note = f"boxes with a score of at least {MIN_SCORE}  ·  {TOKENS}"
    return page(title(observation), [headings, panels], note)
