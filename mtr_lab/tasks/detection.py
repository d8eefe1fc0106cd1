"""Detection: training a head with its backbone, and evaluating both at every operating point."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_masks
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.optim import param_groups_weight_decay
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from mtr_lab.errors import UserError
from mtr_lab.reduction import Reduction
from mtr_lab.report.average_precision import count_objects, match_images
from mtr_lab.report.detections import Detections
from mtr_lab.tasks.detector import Detector
from mtr_lab.tasks.evaluation import BatchedEvaluation, OperatingPoint
from mtr_lab.tasks.training import adamw

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


class DetectionTraining(LightningModule):
    """The sum of the two stages' losses.

    Args:
        detector: to train.
        lr, weight_decay, warmup_epochs: as in :func:`adamw`.

    ``skipped`` holds the names of the images that could not be read.
    """

    def __init__(self, detector: Detector, *, lr: float, weight_decay: float, warmup_epochs: int) -> None:
        super().__init__()
        self.model = detector
        self.lr, self.weight_decay, self.warmup_epochs = lr, weight_decay, warmup_epochs
        self.skipped: set[str] = set()
        self.val_ap = mean_average_precision(detector.head.masks)

    def training_step(self, batch: Mapping[str, Any], index: int) -> Tensor | None:
        self.skipped.update(batch["skipped"])
        if not batch["id"]:
            return None
        losses = self.model.losses(batch)
        loss = torch.stack(list(losses.values())).sum()
        shown = {"train_loss": loss, **{f"train_{name}": value for name, value in losses.items()}}
        self.log_dict(shown, on_step=False, on_epoch=True, batch_size=len(batch["id"]))
        return loss

    def validation_step(self, batch: Mapping[str, Any], index: int) -> None:
        self.skipped.update(batch["skipped"])
        found = [on_cpu(each) for each in self.model.detect(batch, self.model.features(batch["image"]))]
        self.val_ap.update(found, [on_cpu(each) for each in batch["objects"]])

    def on_validation_epoch_end(self) -> None:
        figures = average_precisions(self.val_ap)
        self.log_dict({f"val_{name}": value for name, value in figures.items()}, prog_bar=True)
        self.val_ap.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        exempt: Any = [f"backbone.{name}" for name in self.model.backbone.no_weight_decay()]
        groups = param_groups_weight_decay(self.model, self.weight_decay, exempt)
        return adamw(groups, self.trainer, self.lr, self.warmup_epochs)


class DetectedBatch(NamedTuple):
    """What is known of the images of a batch that could be read."""

    ids: list[str]
    hashes: list[str]
    truths: list[dict[str, Any]]  # of each, as ``match_images`` takes it
    found: list[list[dict[str, Any]]]  # at each point, of each
    states: list[dict[str, Any]]  # at each point, that of COCO's metric: lists with an entry for each
    skipped: list[str]  # ids of the others


class DetectionEvaluation(BatchedEvaluation[DetectedBatch]):
    """Collects what is found in every image at every point.

    Args:
        detector: its backbone is patched by ``reduction``.
        reduction: switches between the schedules.
        points: the operating points, the unreduced model first; without any, the images are read and nothing more.

    After ``trainer.test`` and ``gather()``, ``predictions()`` holds what was found and ``skipped`` the images that
    could not be read.
    """

    def __init__(self, detector: Detector, reduction: Reduction, points: Sequence[OperatingPoint]) -> None:
        super().__init__(reduction, points)
        self.model = detector

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
        if not features.isfinite().all():
            raise UserError(
                f"the model's outputs at {point.name} are infinite or not a number: use another precision "
                "(trainer.precision=32-true), or other weights."
            )
        return self.model.detect(batch, features)

    def test_step(self, batch: Mapping[str, Any], index: int) -> None:
        truths = [on_cpu(each) for each in batch["objects"]]
        detected = DetectedBatch(batch["id"], batch["hash"], list(map(as_arrays, truths)), [], [], batch["skipped"])
        for point in self.points if batch["id"] else []:
            found = [on_cpu(each) for each in self.detect_at(point, batch)]
            metric = mean_average_precision(self.model.head.masks)
            metric.update(found, truths)
            detected.found.append(list(map(as_arrays, found)))
            detected.states.append(metric.metric_state)
        self.batches.append(detected)

    def predictions(self) -> Detections:
        """What was found in every image that could be read, at every point.

        Raises:
            UserError: no image could be read.
        """
        images, classes = self.images(), self.model.head.num_classes
        read = [batch for batch in self.batches if batch.ids]
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
            found=_joined([each.found for each in matches], np.int8, 10),
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
