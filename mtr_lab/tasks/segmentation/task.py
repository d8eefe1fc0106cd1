"""Semantic segmentation as a task: UPerNet on a backbone's maps."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning import LightningModule
from omegaconf import DictConfig

from mtr_lab.backbones import Backbone
from mtr_lab.data import SegmentationDataModule
from mtr_lab.data.segmentation.transforms import first_window
from mtr_lab.errors import UserError, unknown
from mtr_lab.pictures import save_picture, segmentation_sheet
from mtr_lab.reduction import Reduction
from mtr_lab.tasks.evaluation import OperatingPoint
from mtr_lab.tasks.segmentation.evaluation import SegmentationEvaluation
from mtr_lab.tasks.segmentation.model import Segmenter
from mtr_lab.tasks.segmentation.training import SegmentationTraining
from mtr_lab.tasks.task import DenseTask, Drawing, adamw_settings


class Segmentation(DenseTask[Segmenter, SegmentationEvaluation]):
    """Semantic segmentation: a class for each pixel, evaluated by mean intersection over union.

    Args:
        settings: the arguments of ``Segmenter`` besides backbone and number of classes.
    """

    name = "segmentation"
    datamodule = SegmentationDataModule
    bundled = "camvid"

    def check(self, trainer: DictConfig) -> None:
        if trainer.cuda_graph:
            raise UserError("trainer.cuda_graph=true: a segmenter is evaluated without CUDA graphs. Set false.")

    def assemble(self, backbone: Backbone, num_classes: int) -> Segmenter:
        known = list(inspect.signature(Segmenter).parameters)[2:]
        for name in self.settings:
            if name not in known:
                raise unknown("setting task.", name, known)
        return Segmenter(backbone, num_classes, **self.settings)

    def evaluation(
        self, model: Segmenter, reduction: Reduction, points: Sequence[OperatingPoint], cuda_graph: bool
    ) -> SegmentationEvaluation:
        return SegmentationEvaluation(model, reduction, points)

    def training(self, model: Segmenter, config: DictConfig) -> LightningModule:
        return SegmentationTraining(model, **adamw_settings(config), cuda_graph=config.trainer.cuda_graph)

    def single_images(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        windows = batch["image"].split([len(places) for places in batch["windows"]])
        for image, single in zip(windows, super().single_images(batch), strict=True):
            yield {**single, "image": image}

    def draw(self, drawing: Drawing[SegmentationEvaluation]) -> None:
        """Draw the first window of the image, one input of the model."""
        window = drawing.image["image"][:1]
        logits = {point.words: drawing.evaluation.forward_at(point, window)[0] for point in drawing.points}
        labels = {name: values.argmax(0).cpu().numpy() for name, values in logits.items()}
        (observation,) = drawing.observe(window)
        truth = first_window(drawing.image["label"][0], drawing.image["size"][0], window.shape[-2:])
        save_picture(segmentation_sheet(observation, labels, drawing.class_names, truth), drawing.stem)
