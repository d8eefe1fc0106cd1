"""COCO's average precision from matches that are kept image by image, so that images can be resampled.

Lin et al., "Microsoft COCO: Common Objects in Context", arXiv 1405.0312. The figures that are reported are
torchmetrics'; tests hold these to them. Intervals and paired differences need the parts that go into them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_masks

from mtr_lab.results.resampling import AP_RESAMPLES, resampled_counts

IOU = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
"""The overlaps, intersection over union, from which on a detection counts: AP is the mean over them, AP50 the first."""
_STEPS = np.arange(51) * float(np.float32(0.01))
RECALLS = np.concatenate([_STEPS[:50], 1 - _STEPS[::-1]]).astype(np.float32).astype(float)
"""0, 0.01, …, 1 with torchmetrics' rounding, that of ``torch.linspace``, since a recall may equal one of them."""
MOST = 100
"""How many detections of a class count in an image: those of the highest scores."""
MISSED, FOUND, IGNORED = 0, 1, -1


@dataclass(frozen=True)
class Matches:
    """What is found of n images' objects of K classes by d detections, in any order."""

    image: np.ndarray
    """(d,) int64, the image of a detection, from 0."""
    label: np.ndarray
    """(d,) int64, its class."""
    score: np.ndarray
    """(d,) float32."""
    box: np.ndarray
    """(d, 4) float32, where it is: left, top, right, bottom."""
    found: np.ndarray
    """(d, 10) int8 for the overlaps ``IOU``: 1 an object that no better detection has found, 0 none, -1 to ignore."""
    objects: np.ndarray
    """(n, K) int64, how many objects of a class are in an image, those to ignore left out."""


def match(scores: np.ndarray, overlaps: np.ndarray, ignore: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the detections of a class in an image, the best first, the objects they overlap most.

    Args:
        scores: (d,).
        overlaps: (d, g) with the objects, intersection over union; with those to ignore, over the detection's area.
        ignore: (g,) bool.

    Returns:
        which detections count, at most ``MOST``, by falling score, and ``found`` of them as in ``Matches``.
    """
    order = np.argsort(-scores, kind="stable")[:MOST]
    found = np.zeros((len(order), len(IOU)), np.int8)
    for column, threshold in enumerate(IOU):
        free = np.ones(len(ignore), bool)
        for row, detection in enumerate(order):
            good = free & (overlaps[detection] >= threshold)
            candidates = good & ~ignore if (good & ~ignore).any() else good
            if not candidates.any():
                continue
            # Of equal overlaps the last, as COCO's own evaluation chooses.
            places = np.flatnonzero(candidates)
            taken = places[len(places) - 1 - np.argmax(overlaps[detection][places][::-1])]
            found[row, column] = IGNORED if ignore[taken] else FOUND
            free[taken] = bool(ignore[taken])  # a crowd can be found any number of times
    return order, found


def match_images(detections: list[dict[str, Any]], truths: list[dict[str, Any]], num_classes: int) -> Matches:
    """Match every image's detections with its objects, class by class.

    Args:
        detections: of each image ``boxes`` (m, 4), ``scores`` (m,), ``labels`` (m,) and ``shapes``, which are
            compared: boxes (m, 4) as left, top, width, height, or m run lengths of masks.
        truths: of each image ``shapes``, ``labels``, ``iscrowd``, so many each.
        num_classes: K.
    """
    nothing = np.zeros(0, np.int64)
    parts = [
        (nothing, nothing, np.zeros(0, np.float32), np.zeros((0, 4), np.float32), np.zeros((0, len(IOU)), np.int8))
    ]
    for image, (detected, truth) in enumerate(zip(detections, truths, strict=True)):
        for label in np.unique(detected["labels"]):
            mine, theirs = np.flatnonzero(detected["labels"] == label), np.flatnonzero(truth["labels"] == label)
            ignore, scores = truth["iscrowd"][theirs], detected["scores"][mine]
            overlaps = np.zeros((len(mine), 0))
            if len(theirs):
                shapes = [_chosen(each["shapes"], rows) for each, rows in ((detected, mine), (truth, theirs))]
                overlaps = np.asarray(coco_masks.iou(*shapes, ignore.astype(np.uint8).tolist()))
            order, found = match(scores, overlaps.reshape(len(mine), len(theirs)), ignore)
            boxes = detected["boxes"][mine][order]
            parts.append((np.full(len(order), image), np.full(len(order), label), scores[order], boxes, found))
    image_, label_, score_, box_, found_ = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Matches(image_, label_, score_, box_, found_, count_objects(truths, num_classes))


def count_objects(truths: list[dict[str, Any]], num_classes: int) -> np.ndarray:
    """How many objects of each class are in each image, (n, K) int64, those to ignore left out."""
    counted = [truth["labels"][~truth["iscrowd"]] for truth in truths]
    return np.stack([np.bincount(labels, minlength=num_classes) for labels in counted])


def average_precision(matches: Matches, counts: np.ndarray | None = None) -> np.ndarray:
    """AP at every overlap of ``IOU``, (10,), the mean over the classes that have objects.

    Args:
        counts: (n,), how many times each image is taken, once by default.

    Returns:
        fractions; NaN if there are no objects.
    """
    counts = np.ones(len(matches.objects)) if counts is None else counts
    objects = counts @ matches.objects
    each = [_class_precision(matches, int(label), counts, objects[label]) for label in np.flatnonzero(objects)]
    return np.mean(each, axis=0) if each else np.full(len(IOU), np.nan)


def resampled_precision(matches: Matches, resamples: int = AP_RESAMPLES, seed: int = 0) -> np.ndarray:
    """AP and AP50 of images drawn with replacement, (resamples, 2)."""
    draws = resampled_counts(len(matches.objects), resamples, seed)
    precisions = [average_precision(matches, counts) for counts in draws]
    return np.array([(precision.mean(), precision[0]) for precision in precisions])


def _class_precision(matches: Matches, label: int, counts: np.ndarray, objects: float) -> np.ndarray:
    rows = np.flatnonzero(matches.label == label)
    rows = rows[np.argsort(-matches.score[rows], kind="stable")]
    weight = counts[matches.image[rows]][:, None]
    right = np.cumsum(weight * (matches.found[rows] == FOUND), axis=0)
    wrong = np.cumsum(weight * (matches.found[rows] == MISSED), axis=0)
    precision = right / np.maximum(right + wrong, np.finfo(float).tiny)
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]  # the best at this recall or a higher one
    result = np.zeros(len(IOU))
    for column in range(len(IOU)):
        places = np.searchsorted(right[:, column] / objects, RECALLS)
        result[column] = np.append(precision[:, column], 0)[places].mean()
    return result


def _chosen(shapes: Any, rows: np.ndarray) -> Any:
    return shapes[rows] if isinstance(shapes, np.ndarray) else [shapes[row] for row in rows]
