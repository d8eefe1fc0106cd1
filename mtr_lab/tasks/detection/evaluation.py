"""Evaluating a detector: the objects found in every image at every operating point."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval.core import mask as coco_masks
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from mtr_lab.results.average_precision import count_objects, match_images
from mtr_lab.results.detections import Detections
from mtr_lab.tasks.detection.model import Detector
from mtr_lab.tasks.evaluation import BatchedEvaluation, OperatingPoint, check_finite

logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)  # it prints a table at every evaluation


def mean_average_precision(masks: bool) -> MeanAveragePrecision:
    """COCO's metric, of boxes, or of boxes and masks: of masks alone it would leave out images without objects.

    Of what its own process has seen: it never asks the others.
    """
    return MeanAveragePrecision(
        iou_type=("bbox", "segm") if masks else "bbox", backend="faster_coco_eval", sync_on_compute=False
    )


def average_precisions(metric: MeanAveragePrecision) -> dict[str, float]:
    """``map`` and ``ap50``, of masks if there are any, fractions; NaN where there are no objects."""
    figures = metric.compute()
    kind = "segm_" if "segm" in metric.iou_type else ""
    found = {"map": float(figures[f"{kind}map"]), "ap50": float(figures[f"{kind}map_50"])}
    return {name: math.nan if value < 0 else value for name, value in found.items()}  # -1: no objects


class DetectedBatch(NamedTuple):
    """What is known of the images of a batch that could be read."""

    ids: np.ndarray  # (B,) str
    hashes: np.ndarray
    truths: list[dict[str, Any]]  # of each, as ``match_images`` takes it
    found: list[list[dict[str, Any]]]  # at each point, of each
    states: list[dict[str, Any]]  # at each point, that of COCO's metric: lists with an entry for each
    skipped: list[str]  # ids of the others


class DetectionEvaluation(BatchedEvaluation[DetectedBatch]):
    """Collects what is found in every image at every point; the model is a detector."""

    model: Detector

    def forward_at(self, point: OperatingPoint, images: Tensor) -> list[dict[str, Tensor]]:
        """What is found at one point in images (B, 3, H, W) that fill the model's input."""
        sizes = [tuple(images.shape[-2:])] * len(images)
        return self.detect_at(point, {"image": images, "size": sizes, "original_size": sizes})

    def detect_at(self, point: OperatingPoint, batch: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """What is found at one point, see :meth:`Detector.detect`.

        Raises:
            UserError: the model's outputs are not numbers.
        """
        self.reduction.use(point.schedule)
        features = self.model.features(batch["image"])
        check_finite(features, point)
        return self.model.detect(batch, features)

    def test_step(self, batch: Mapping[str, Any], index: int) -> None:
        truths = [on_cpu(each) for each in batch["objects"]]
        detected = DetectedBatch(batch["id"], batch["hash"], list(map(as_arrays, truths)), [], [], batch["skipped"])
        for point in self.points if len(batch["id"]) else []:
            found = [on_cpu(each) for each in self.detect_at(point, batch)]
            metric = mean_average_precision(self.model.head.masks)
            metric.update(found, truths)
            detected.found.append(list(map(as_arrays, found)))
            detected.states.append(metric.metric_state)
        self.keep(detected)

    def predictions(self) -> Detections:
        """What was found in every image that could be read, at every point.

        Raises:
            UserError: no image could be read.
        """
        images, classes = self.images(), self.model.head.num_classes
        read = [batch for batch in self.batches if len(batch.ids)]
        truths = [each for batch in read for each in batch.truths]
        matches = [
            match_images([each for batch in read for each in batch.found[i]], truths, classes)
            for i in range(len(self.points))
        ]
        figures = [
            list(average_precisions(self._metric([batch.states[i] for batch in read])).values())
            for i in range(len(self.points))
        ]
        return Detections(
            **images,
            labels=count_objects(truths, classes),
            points=np.array([point.name for point in self.points]),
            figures=np.array(figures).reshape(-1, 2),
            point=_joined([np.full(len(each.image), i) for i, each in enumerate(matches)], np.int64),
            image=_joined([each.image for each in matches], np.int64),
            label=_joined([each.label for each in matches], np.int64),
            score=_joined([each.score for each in matches], np.float32),
            box=_joined([each.box for each in matches], np.float32, 4),
            hits=_joined([each.hits for each in matches], np.int8, 10),
        )

    def _metric(self, states: Sequence[Mapping[str, Any]]) -> MeanAveragePrecision:
        """COCO's metric of what several have seen, in turn."""
        metric = mean_average_precision(self.model.head.masks)
        metric.update([], [])  # else it would warn that it has seen nothing
        for name in metric.metric_state:
            setattr(metric, name, [each for state in states for each in state[name]])
        return metric


def on_cpu(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A detection or the objects of an image, on the host."""
    return {name: value.cpu() for name, value in values.items()}


def as_arrays(objects: Mapping[str, Tensor]) -> dict[str, Any]:
    """A detection or the objects of an image as ``match_images`` takes them."""
    arrays: dict[str, Any] = {name: value.numpy() for name, value in objects.items() if name != "masks"}
    boxes = arrays["boxes"].astype(np.float64)
    arrays["shapes"] = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    if "masks" in objects:  # as run lengths: thousands of whole masks would not fit into memory
        arrays["shapes"] = [coco_masks.encode(np.asfortranarray(mask.numpy(), np.uint8)) for mask in objects["masks"]]
    return arrays


def _joined(parts: Sequence[np.ndarray], kind: Any, *shape: int) -> np.ndarray:
    return np.concatenate([np.zeros((0, *shape), kind), *parts]).astype(kind)
