"""Detection as a task: Faster or Mask R-CNN on a backbone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule
from omegaconf import DictConfig
from torch import Tensor

from mtr_lab.backbones import Backbone
from mtr_lab.backbones.weights import Checkpoint
from mtr_lab.data import DetectionDataModule
from mtr_lab.errors import UserError
from mtr_lab.pictures import MIN_SCORE, Boxes, detection_sheet, save_picture
from mtr_lab.reduction import Reduction
from mtr_lab.tasks.detection.evaluation import DetectionEvaluation
from mtr_lab.tasks.detection.model import Detector
from mtr_lab.tasks.detection.training import DetectionTraining
from mtr_lab.tasks.evaluation import OperatingPoint
from mtr_lab.tasks.task import DenseTask, Drawing, adamw_settings


class Detection(DenseTask[Detector, DetectionEvaluation]):
    """Detection: boxes, and masks if the head has them, evaluated by COCO's average precision.

    Args:
        settings: the arguments of ``Detector`` besides backbone and number of classes, such as ``masks``.
    """

    name = "detection"
    datamodule = DetectionDataModule
    bundled = "bccd"

    def check(self, trainer: DictConfig) -> None:
        if trainer.cuda_graph:
            raise UserError(
                "trainer.cuda_graph=true: a detector has a different number of boxes in every image. Set false."
            )
        if str(trainer.precision) in ("16-true", "bf16-true"):
            mixed = str(trainer.precision).replace("true", "mixed")
            raise UserError(
                f"trainer.precision={trainer.precision}: boxes need 32 bits. Use trainer.precision={mixed}."
            )

    def check_training(self, config: DictConfig, devices: int) -> None:
        super().check_training(config, devices)
        self.check(config.trainer)

    def data_arguments(self, meta_model: Backbone, checkpoint: Checkpoint | None) -> dict[str, Any]:
        return {**super().data_arguments(meta_model, checkpoint), "masks": self.settings["masks"]}

    def training_arguments(self, meta_model: Any) -> dict[str, Any]:
        return {"masks": self.settings["masks"]}

    def assemble(self, backbone: Backbone, num_classes: int) -> Detector:
        return Detector(backbone, num_classes, **self.settings)

    def evaluation(
        self, model: Detector, reduction: Reduction, points: Sequence[OperatingPoint], cuda_graph: bool
    ) -> DetectionEvaluation:
        return DetectionEvaluation(model, reduction, points)

    def training(self, model: Detector, config: DictConfig) -> LightningModule:
        return DetectionTraining(model, **adamw_settings(config))

    def draw(self, drawing: Drawing[DetectionEvaluation]) -> None:
        (size,), (original,), (objects,) = (drawing.image[key] for key in ("size", "original_size", "objects"))
        detections = {}
        for point in drawing.points:
            (detection,) = drawing.evaluation.detect_at(point, {**drawing.image, "original_size": [size]})
            detections[point.words] = _boxes(detection, detection["scores"] >= MIN_SCORE)
        shrunk = objects["boxes"] * objects["boxes"].new_tensor([size[1] / original[1], size[0] / original[0]] * 2)
        scored = {**objects, "boxes": shrunk, "scores": torch.ones(len(shrunk))}
        truth = _boxes(scored, ~objects["iscrowd"].bool())
        (observation,) = drawing.observe(drawing.image["image"])
        save_picture(detection_sheet(observation, detections, drawing.class_names, truth), drawing.stem)


def _boxes(objects: Mapping[str, Tensor], chosen: Tensor) -> Boxes:
    boxes, labels, scores = (objects[key][chosen].cpu() for key in ("boxes", "labels", "scores"))
    return Boxes(boxes.float().numpy(), labels.long().numpy(), scores.float().numpy())
