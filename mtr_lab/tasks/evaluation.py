"""Evaluating a classifier at every operating point: each batch is decoded once and run at all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor

from mtr_lab.backbones import VisionMamba, compile
from mtr_lab.errors import UserError
from mtr_lab.reduction import Reduction, Schedule
from mtr_lab.report.predictions import Predictions, point_name, top_classes


@dataclass(frozen=True)
class OperatingPoint:
    """A policy at one ratio; ``ratio`` is the asked share of the FLOPs, ``None`` if the counts were given."""

    policy: str
    ratio: float | None
    schedule: Schedule

    @property
    def name(self) -> str:
        return point_name(self.policy, self.ratio)


class ClassifierEvaluation(LightningModule):
    """Collects the log-probabilities of every image at every point.

    Args:
        model: the classifier, patched by ``reduction``.
        reduction: switches between the schedules.
        points: the operating points, the unreduced model first; without any, the images are read and nothing more.
        cuda_graph: run the model as ``mtr_lab.compile`` does.

    After ``trainer.test``, ``predictions()`` holds what was found and ``skipped`` the images that could not be read.
    """

    def __init__(
        self,
        model: VisionMamba,
        reduction: Reduction,
        points: Sequence[OperatingPoint],
        cuda_graph: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.reduction = reduction
        self.points = points
        # A graph of each point for a full batch and the last one, and to be timed, for another batch and one image.
        self._classify = compile(model, max_graphs=4 * max(len(points), 1)) if cuda_graph else model.__call__
        self.skipped: list[str] = []
        self._ids: list[str] = []
        self._hashes: list[str] = []
        self._labels: list[Tensor] = []
        self._log_probs: list[Tensor] = []
        self._top5: list[np.ndarray] = []

    def forward_at(self, point: OperatingPoint, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) at one point."""
        self.reduction.use(point.schedule)
        return self._classify(images)

    def test_step(self, batch: Mapping[str, Any], index: int) -> None:
        self.skipped += batch["skipped"]
        if not batch["id"]:
            return
        self._ids += batch["id"]
        self._hashes += batch["hash"]
        self._labels.append(batch["label"].cpu())
        none = batch["image"].new_empty(0, len(batch["id"]), self.model.num_classes)
        logits = torch.stack([self.forward_at(point, batch["image"]) for point in self.points]) if self.points else none
        log_probs = logits.float().log_softmax(-1).cpu()  # (p, B, K)
        self._log_probs.append(log_probs)
        self._top5.append(top_classes(log_probs.numpy()))

    def predictions(self) -> Predictions:
        """What the model predicted for every image that could be read, at every point.

        Raises:
            UserError: no image could be read, or the model's outputs are not numbers.
        """
        if not self._ids:
            raise UserError("not one image could be read: there is nothing to report.")
        log_probs = torch.cat(self._log_probs, dim=1).numpy()
        for point, rows in zip(self.points, log_probs, strict=True):
            finite = np.isfinite(rows).all(axis=1)
            if not finite.all():
                raise UserError(
                    f"the model's outputs at {point.name} are infinite or not a number for {(~finite).sum()} of "
                    f"{len(finite)} images: use another precision (trainer.precision=32-true), or other weights."
                )
        return Predictions(
            ids=np.array(self._ids),
            hashes=np.array(self._hashes),
            labels=torch.cat(self._labels).numpy(),
            points=np.array([point.name for point in self.points]),
            top5=np.concatenate(self._top5, axis=1),
            log_probs=log_probs,
        )
