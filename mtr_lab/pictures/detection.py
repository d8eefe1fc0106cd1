"""Pictures of detections: the boxes at two operating points, beside the truth and the surviving tokens."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torchvision.ops import box_iou

from mtr_lab.pictures.marks import Colour, Frame, Sheet, Text, raster
from mtr_lab.pictures.observation import Observation
from mtr_lab.pictures.page import label, page
from mtr_lab.pictures.palette import LOST, OTHER, WON, class_colours
from mtr_lab.pictures.panels import faint_panel, image_panel
from mtr_lab.pictures.sheets import SCORES, TOKENS, dense_rows, dense_scale, title

MIN_SCORE = 0.5
"""Boxes with a lower score are not drawn."""
MIN_IOU = 0.5
"""A box is right if it overlaps an object of its class with an intersection over union of at least this."""
_SMALL = 14  # font size of scores, in pixels


class Boxes(NamedTuple):
    """Detections, or the objects of the truth, whose scores are 1."""

    boxes: np.ndarray
    """(m, 4): left, top, right, bottom in pixels of the image."""
    labels: np.ndarray
    """(m,) int64."""
    scores: np.ndarray
    """(m,)."""


def found_objects(detected: Boxes, truth: Boxes) -> np.ndarray:
    """The object of the truth (n) that each detection (m) finds, (m,) int64; -1 for a wrong one.

    By falling score, a detection finds the object of its class that it overlaps most, of those not yet found; as in
    average precision at an intersection over union of ``MIN_IOU``.
    """
    overlaps = box_iou(torch.from_numpy(detected.boxes).float(), torch.from_numpy(truth.boxes).float()).numpy()
    overlaps = np.where(detected.labels[:, None] == truth.labels, overlaps, 0)
    objects = np.full(len(detected.boxes), -1)
    for i in np.argsort(-detected.scores, kind="stable"):
        if len(truth.boxes) and overlaps[i].max() >= MIN_IOU:
            objects[i] = overlaps[i].argmax()
            overlaps[:, objects[i]] = 0
    return objects


def detection_sheet(
    observation: Observation, detections: Mapping[str, Boxes], classes: Sequence[str], truth: Boxes
) -> Sheet:
    """The input, the truth and the surviving tokens; below, the boxes at two points, and the objects lost between them.

    Args:
        observation: the image, processed under one policy.
        detections: heading -> boxes with a score of at least ``MIN_SCORE``; the unreduced model's, and the reduced
            model's.
        classes: names in label order.
        truth: the objects.
    """
    (first, before), (second, after) = detections.items()
    image, scale = observation.image, dense_scale(observation)
    colours: list[Colour] = [(red, green, blue) for red, green, blue in class_colours(len(classes)).tolist()]
    large = raster(image_panel(image, scale))

    def outlined(boxes: Boxes, right: np.ndarray) -> Sheet:
        """Boxes in the colours of their classes, dashed if wrong, with their scores."""
        marks = [
            mark
            for box, label_, score, good in zip(boxes.boxes, boxes.labels, boxes.scores, right, strict=True)
            for mark in _box(box * scale, colours[label_], "" if score == 1 else f"{100 * score:.0f}", dashed=not good)
        ]
        return Sheet(*large.size, (*large.marks, *marks))

    ours, theirs = found_objects(before, truth), found_objects(after, truth)
    lost = np.setdiff1d(ours[ours >= 0], theirs)
    won = np.setdiff1d(theirs[theirs >= 0], ours)
    # A wrong box of the reduced model is new unless the unreduced model has about the same.
    new = np.flatnonzero((theirs < 0) & (found_objects(after, before) < 0))
    changes = [
        mark
        for boxes, places, colour in ((truth, lost, LOST), (truth, won, WON), (after, new, OTHER))
        for place in places
        for mark in _box(boxes.boxes[place] * scale, colour, classes[boxes.labels[place]])
    ]
    grey = raster(faint_panel(image, scale))
    rows = dense_rows(
        observation,
        [
            (label("input"), large),
            (label("truth", _counts(truth, classes)), outlined(truth, np.ones(len(truth.boxes), bool))),
        ],
        [
            (label(first, _verdict(ours, truth)), outlined(before, ours >= 0)),
            (label(second, _verdict(theirs, truth)), outlined(after, theirs >= 0)),
            (
                label("what changes", f"{len(lost)} lost, {len(won)} won, {len(new)} new and wrong"),
                Sheet(*grey.size, (*grey.marks, *changes)),
            ),
        ],
    )
    note = (
        f"boxes with a score of at least {100 * MIN_SCORE:.0f} %, their scores in %  ·  dashed: wrong, no object of "
        f"this class overlaps by {100 * MIN_IOU:.0f} %\n{TOKENS}  ·  {SCORES}"
    )
    verdicts = [("lost object", LOST), ("won object", WON), ("new wrong box", OTHER)]
    return page(title(observation), rows, note, [*zip(classes, colours, strict=True), *verdicts])


def _box(box: np.ndarray, colour: Colour, words: str, dashed: bool = False) -> list[tuple[float, float, Frame | Text]]:
    left, top, right, bottom = box.tolist()
    frame = (left, top, Frame(right - left, bottom - top, colour, dashed=dashed))
    return [frame, *([(left + 6, top + 4, Text(words, _SMALL, halo=True))] if words else [])]


def _counts(boxes: Boxes, classes: Sequence[str]) -> str:
    counts = np.bincount(boxes.labels, minlength=len(classes))
    return ", ".join(f"{count} {name}" for count, name in zip(counts, classes, strict=True) if count) or "no objects"


def _verdict(objects: np.ndarray, truth: Boxes) -> str:
    """How many objects the detections find, and how many detections are wrong."""
    return f"{(objects >= 0).sum()} of {len(truth.boxes)} objects found, {(objects < 0).sum()} wrong"
