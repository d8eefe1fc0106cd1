"""COCO's average precision from matches stored per image, so that images can be resampled.

Results report torchmetrics' figures; intervals and paired differences are computed here, and tests check that both
agree. Source: Lin et al., "Microsoft COCO: Common Objects in Context", arXiv 1405.0312.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_masks

from mtr_lab.results.resampling import AP_RESAMPLES, resampled_counts

IOU = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
"""The thresholds of intersection over union: AP is the mean over them, AP50 belongs to the first."""
_STEPS = np.arange(51) * float(np.float32(0.01))
RECALLS = np.concatenate([_STEPS[:50], 1 - _STEPS[::-1]]).astype(np.float32).astype(float)
"""0, 0.01, …, 1, rounded as torchmetrics does (``torch.linspace``), since a recall may equal one of them."""
MAX_DETECTIONS = 100
"""Only that many detections of a class count in an image, those with the highest scores."""
FALSE_POSITIVE, TRUE_POSITIVE, IGNORED = 0, 1, -1


@dataclass(frozen=True)
class Matches:
    """d detections matched with the objects of n images and K classes; the detections are in any order."""

    image: np.ndarray
    """(d,) int64, the image of each detection, from 0."""
    label: np.ndarray
    """(d,) int64, its class."""
    score: np.ndarray
    """(d,) float32."""
    box: np.ndarray
    """(d, 4) float32: left, top, right, bottom."""
    hits: np.ndarray
    """(d, 10) int8 at each threshold of ``IOU``: 1 true positive, 0 false positive, -1 ignored."""
    objects: np.ndarray
    """(n, K) int64, the number of objects of each class in each image, without those to ignore."""


def match(scores: np.ndarray, overlaps: np.ndarray, ignore: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Match the detections of one class in one image with its objects, greedily by falling score.

    Args:
        scores: (d,).
        overlaps: (d, g) intersection over union with each object; over the detection's area with objects to ignore.
        ignore: (g,) bool.

    Returns:
        The indices of the detections that count, at most ``MAX_DETECTIONS`` by falling score, and their ``hits`` as in
        ``Matches``.
    """
    order = np.argsort(-scores, kind="stable")[:MAX_DETECTIONS]
    hits = np.zeros((len(order), len(IOU)), np.int8)
    for column, threshold in enumerate(IOU):
        free = np.ones(len(ignore), bool)
        for row, detection in enumerate(order):
            good = free & (overlaps[detection] >= threshold)
            candidates = good & ~ignore if (good & ~ignore).any() else good
            if not candidates.any():
                continue
            # The last of equal overlaps, as in COCO's evaluation.
            places = np.flatnonzero(candidates)
            taken = places[len(places) - 1 - np.argmax(overlaps[detection][places][::-1])]
            hits[row, column] = IGNORED if ignore[taken] else TRUE_POSITIVE
            free[taken] = bool(ignore[taken])  # a crowd matches any number of detections
    return order, hits


def match_images(detections: list[dict[str, Any]], truths: list[dict[str, Any]], num_classes: int) -> Matches:
    """Match every image's detections with its objects, class by class.

    Args:
        detections: for each image ``boxes`` (m, 4), ``scores`` (m,), ``labels`` (m,) and the ``shapes`` to compare:
            boxes (m, 4) as left, top, width, height, or the run-length encodings of m masks.
        truths: for each image ``shapes``, ``labels`` and ``iscrowd`` of its objects.
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
                shapes = [_chosen(detected["shapes"], mine), _chosen(truth["shapes"], theirs)]
                overlaps = np.asarray(coco_masks.iou(*shapes, ignore.astype(np.uint8).tolist()))
            order, hits = match(scores, overlaps.reshape(len(mine), len(theirs)), ignore)
            boxes = detected["boxes"][mine][order]
            parts.append((np.full(len(order), image), np.full(len(order), label), scores[order], boxes, hits))
    image_, label_, score_, box_, hits_ = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Matches(image_, label_, score_, box_, hits_, count_objects(truths, num_classes))


def count_objects(truths: list[dict[str, Any]], num_classes: int) -> np.ndarray:
    """The number of objects of each class in each image, (n, K) int64, without those to ignore."""
    counted = [truth["labels"][~truth["iscrowd"]] for truth in truths]
    return np.stack([np.bincount(labels, minlength=num_classes) for labels in counted])


def average_precision(matches: Matches, counts: np.ndarray | None = None) -> np.ndarray:
    """AP at each threshold of ``IOU``, (10,): the mean over the classes that have objects.

    Args:
        counts: (n,) how many times each image counts, once by default.

    Returns:
        Fractions; NaN if there are no objects.
    """
    counts = np.ones(len(matches.objects)) if counts is None else counts
    objects = counts @ matches.objects
    classes = np.flatnonzero(objects)
    precisions = [_class_precision(matches, int(label), counts, objects[label]) for label in classes]
    return np.mean(precisions, axis=0) if precisions else np.full(len(IOU), np.nan)


def resampled_precision(matches: Matches, resamples: int = AP_RESAMPLES, seed: int = 0) -> np.ndarray:
    """AP and AP50 of images drawn with replacement, (resamples, 2)."""
    draws = resampled_counts(len(matches.objects), resamples, seed)
    precisions = [average_precision(matches, counts) for counts in draws]
    return np.array([(precision.mean(), precision[0]) for precision in precisions])


def _class_precision(matches: Matches, label: int, counts: np.ndarray, objects: float) -> np.ndarray:
    rows = np.flatnonzero(matches.label == label)
    rows = rows[np.argsort(-matches.score[rows], kind="stable")]
    weight = counts[matches.image[rows]][:, None]
    right = np.cumsum(weight * (matches.hits[rows] == TRUE_POSITIVE), axis=0)
    wrong = np.cumsum(weight * (matches.hits[rows] == FALSE_POSITIVE), axis=0)
    precision = right / np.maximum(right + wrong, np.finfo(float).tiny)
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]  # the highest at this recall or a higher one
    result = np.zeros(len(IOU))
    for column in range(len(IOU)):
        places = np.searchsorted(right[:, column] / objects, RECALLS)
        result[column] = np.append(precision[:, column], 0)[places].mean()
    return result


def _chosen(shapes: Any, rows: np.ndarray) -> Any:
    return shapes[rows] if isinstance(shapes, np.ndarray) else [shapes[row] for row in rows]
