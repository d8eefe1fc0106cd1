"""Training a detector."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mtr_lab.tasks.dense_training import DenseTraining
from mtr_lab.tasks.detection.evaluation import average_precisions, mean_average_precision, on_cpu
from mtr_lab.tasks.detection.model import Detector


class DetectionTraining(DenseTraining):
    """The sum of the two stages' losses; the arguments are those of :class:`DenseTraining`."""

    def __init__(self, detector: Detector, *, lr: float, weight_decay: float, warmup_epochs: int) -> None:
        super().__init__(detector, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs)
        self.val_ap = mean_average_precision(detector.head.masks)

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return self.model.losses(batch)

    def validation_step(self, batch: Mapping[str, Any], index: int) -> None:
        self.skipped.update(batch["skipped"])
        detections = self.model.detect(batch, self.model.features(batch["image"]))
        self.val_ap.update(list(map(on_cpu, detections)), list(map(on_cpu, batch["objects"])))

    def on_validation_epoch_end(self) -> None:
        figures = average_precisions(self.val_ap)
        self.log_dict({f"val_{name}": value for name, value in figures.items()}, prog_bar=True, sync_dist=True)
        self.val_ap.reset()
