"""Evaluation of a detector: the objects detected in every image at every operating point."""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval.core import mask as coco_masks
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from mtr_lab.results.average_precision import count_objects, match_images
from mtr_lab.results.detections import Detections
from mtr_lab.tasks.detection.model import Detector
from mtr_lab.tasks.evaluation import Evaluation, OperatingPoint, check_finite

logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)  # it prints a table at every evaluation


def mean_average_precision(masks: bool) -> MeanAveragePrecision:
    """COCO's metric, of boxes, or of boxes and masks: of masks alone it would leave out images without objects.

    It covers the images of this process, without synchronisation.
    """
    return MeanAveragePrecision(
        iou_type=("bbox", "segm") if masks else "bbox", backend="faster_coco_eval", sync_on_compute=False
    )


def average_precisions(metric: MeanAveragePrecision) -> dict[str, float]:
    """``map`` and ``ap50``, of masks if the metric has them, fractions; NaN without objects."""
    figures = metric.compute()
    kind = "segm_" if "segm" in metric.iou_type else ""
    values = {"map": float(figures[f"{kind}map"]), "ap50": float(figures[f"{kind}map_50"])}
    return {name: math.nan if value < 0 else value for name, value in values.items()}  # -1: no objects


class DetectedBatch(NamedTuple):
    """Results of the images of a batch that could be read."""

    ids: np.ndarray  # (B,) str
    hashes: np.ndarray
    truths: list[dict[str, Any]]  # by image, as ``match_images`` takes them
    detections: list[list[dict[str, Any]]]  # by point and image
    states: list[dict[str, Any]]  # by point, of COCO's metric: lists with an entry for every image
    skipped: list[str]  # names of the images that could not be read


class DetectionEvaluation(Evaluation[DetectedBatch]):
    """Collects the detections in every image at every point; the model is a detector."""

    model: Detector

    def forward_at(self, point: OperatingPoint, images: Tensor) -> list[dict[str, Tensor]]:
        """Detections at one point in images (B, 3, H, W) that fill the model's input."""
        sizes = [tuple(images.shape[-2:])] * len(images)
        return self.detect_at(point, {"image": images, "size": sizes, "original_size": sizes})

    def detect_at(self, point: OperatingPoint, batch: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """Detections at one point, see :meth:`Detector.detect`.

        Raises:
            UserError: the model's outputs are not finite.
        """
        self.reduction.use(point.schedule)
        features = self.model.features(batch["image"])
        check_finite(features if isinstance(features, Tensor) else features[-1], point)
        return self.model.detect(batch, features)

    def _detect_part(self, point: OperatingPoint, batch: Mapping[str, Any], part: slice) -> list[dict[str, Tensor]]:
        images = {name: batch[name][part] for name in ("image", "size", "original_size")}
        return list(map(on_cpu, self.detect_at(point, images)))

    def test_step(self, batch: Mapping[str, Any], index: int) -> None:
        truths = [on_cpu(objects) for objects in batch["objects"]]
        results = DetectedBatch(batch["id"], batch["hash"], list(map(as_arrays, truths)), [], [], batch["skipped"])
        for point in self.points_in_turn() if len(batch["id"]) else []:
            parts = self.in_parts(partial(self._detect_part, point, batch), len(batch["id"]))
            detections = list(chain.from_iterable(parts))
            metric = mean_average_precision(self.model.head.masks)
            metric.update(detections, truths)
            results.detections.append(list(map(as_arrays, detections)))
            results.states.append(metric.metric_state)
        self.keep(results)

    def predictions(self) -> Detections:
        images, classes = self.image_names(), self.model.head.num_classes
        read = [results for results in self.results if len(results.ids)]
        truths = [objects for results in read for objects in results.truths]
        matches = [
            match_images([detection for results in read for detection in results.detections[i]], truths, classes)
            for i in range(len(self.points))
        ]
        figures = [
            list(average_precisions(self._metric([results.states[i] for results in read])).values())
            for i in range(len(self.points))
        ]
        return Detections(
            **images,
            labels=count_objects(truths, classes),
            points=np.array([point.name for point in self.points]),
            figures=np.array(figures).reshape(-1, 2),
            point=_concat([np.full(len(m.image), i) for i, m in enumerate(matches)], np.int64),
            image=_concat([m.image for m in matches], np.int64),
            label=_concat([m.label for m in matches], np.int64),
            score=_concat([m.score for m in matches], np.float32),
            box=_concat([m.box for m in matches], np.float32, 4),
            hits=_concat([m.hits for m in matches], np.int8, 10),
        )

    def _metric(self, states: Sequence[Mapping[str, Any]]) -> MeanAveragePrecision:
        """COCO's metric with the concatenated states of several."""
        metric = mean_average_precision(self.model.head.masks)
        metric.update([], [])  # without an update it warns
        for name in metric.metric_state:
            setattr(metric, name, [entry for state in states for entry in state[name]])
        return metric


def on_cpu(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A detection or the objects of an image, on the host."""
    return {name: value.cpu() for name, value in values.items()}


def as_arrays(objects: Mapping[str, Tensor]) -> dict[str, Any]:
    """A detection or the objects of an image as ``match_images`` takes them."""
    arrays: dict[str, Any] = {name: value.numpy() for name, value in objects.items() if name != "masks"}
    boxes = arrays["boxes"].astype(np.float64)
    arrays["shapes"] = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    if "masks" in objects:  # run lengths: thousands of whole masks would not fit into memory
        arrays["shapes"] = [coco_masks.encode(np.asfortranarray(mask.numpy(), np.uint8)) for mask in objects["masks"]]
    return arrays


def _concat(parts: Sequence[np.ndarray], dtype: Any, *shape: int) -> np.ndarray:
    """Arrays (n, *shape) along the first axis; (0, *shape) of no parts."""
    return np.concatenate([np.zeros((0, *shape), dtype), *parts]).astype(dtype)
