"""Evaluating a classifier: its log-probabilities for every image at every operating point."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtr_lab.backbones import compile
from mtr_lab.errors import UserError
from mtr_lab.reduction import Reduction
from mtr_lab.results.classifications import Classifications, top_classes
from mtr_lab.tasks.evaluation import BatchedEvaluation, OperatingPoint


class ClassifiedBatch(NamedTuple):
    """What is known of the B images of a batch that could be read, at p points."""

    ids: np.ndarray  # (B,) str
    hashes: np.ndarray
    labels: np.ndarray  # (B,) int64
    top5: np.ndarray  # (p, B, 5) int32
    log_probs: np.ndarray  # (p, B, K) float32
    skipped: list[str]  # ids of the others


class _ToHost:
    """A tensor on its way to the host, which need not wait for it."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=tensor.is_cuda)
        self._done = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def arrived(self) -> np.ndarray:
        if self._done is None:
            return self._copy.numpy()
        self._done.synchronize()
        return self._copy.numpy().copy()  # the other is in pinned memory


def _classified(
    ids: np.ndarray, hashes: np.ndarray, skipped: list[str], label: _ToHost, top5: _ToHost, log_probs: _ToHost
) -> ClassifiedBatch:
    return ClassifiedBatch(ids, hashes, label.arrived(), top5.arrived(), log_probs.arrived(), skipped)


class ClassifierEvaluation(BatchedEvaluation[ClassifiedBatch]):
    """Collects the log-probabilities of every image at every point; the model is a classifier.

    What a batch gives is read while the device computes the next one.

    Args:
        model, reduction, points: as those of :class:`BatchedEvaluation`.
        cuda_graph: run the model as ``mtr_lab.compile`` does.
    """

    model: Any

    def __init__(
        self,
        model: Any,
        reduction: Reduction,
        points: Sequence[OperatingPoint],
        cuda_graph: bool = False,
    ) -> None:
        super().__init__(model, reduction, points)
        # A graph of each point for a full batch and the last one, and to be timed, for another batch and one image.
        self._classify = compile(model, max_graphs=4 * max(len(points), 1)) if cuda_graph else model.__call__
        self._pending: Callable[[], ClassifiedBatch] | None = None

    def forward_at(self, point: OperatingPoint, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) at one point."""
        self.reduction.use(point.schedule)
        return self._classify(images)

    def test_step(self, batch: Mapping[str, Any], index: int) -> None:
        images = batch["image"]
        log_probs = torch.empty(len(self.points), len(images), self.model.num_classes)
        if len(images) and self.points:
            logits = torch.stack([self.forward_at(point, images) for point in self.points])
            log_probs = logits.float().log_softmax(-1)
        names = batch["id"], batch["hash"], batch["skipped"]  # nothing of the batch that is on the device
        found = batch["label"], top_classes(log_probs), log_probs
        started = partial(_classified, *names, *map(_ToHost, found))
        self._finish()
        self._pending = started

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._pending = None

    def on_test_epoch_end(self) -> None:
        self._finish()

    def _finish(self) -> None:
        """Keep what was found in the batch before."""
        if self._pending is not None:
            self.keep(self._pending())
            self._pending = None

    def predictions(self) -> Classifications:
        """What the model predicted for every image that could be read, at every point; on rank 0.

        Raises:
            UserError: no image could be read, or the model's outputs are not numbers.
        """
        images = self.images()
        log_probs = np.concatenate([batch.log_probs for batch in self.batches], axis=1)
        for point, rows in zip(self.points, log_probs, strict=True):
            finite = np.isfinite(rows).all(axis=1)
            if not finite.all():
                raise UserError(
                    f"the model's outputs at {point.name} are infinite or not a number for {(~finite).sum()} of "
                    f"{len(finite)} images: use another precision (trainer.precision=32-true), or other weights."
                )
        return Classifications(
            **images,
            labels=np.concatenate([batch.labels for batch in self.batches]),
            points=np.array([point.name for point in self.points]),
            top5=np.concatenate([batch.top5 for batch in self.batches], axis=1),
            log_probs=log_probs,
        )
