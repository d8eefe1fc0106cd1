"""Evaluation of a classifier: its log-probabilities for every image at every operating point."""

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
from mtr_lab.tasks.evaluation import Evaluation, OperatingPoint


class ClassifiedBatch(NamedTuple):
    """Results of the B images of a batch that could be read, at p points."""

    ids: np.ndarray  # (B,) str
    hashes: np.ndarray
    labels: np.ndarray  # (B,) int64
    top5: np.ndarray  # (p, B, 5) int32
    log_probs: np.ndarray  # (p, B, K) float32; empty once ``receive`` has taken them
    skipped: list[str]  # names of the images that could not be read


class _HostCopy:
    """An asynchronous copy of a tensor to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=tensor.is_cuda)
        self._done = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def wait(self) -> np.ndarray:
        if self._done is None:
            return self._copy.numpy()
        self._done.synchronize()
        return self._copy.numpy().copy()  # out of pinned memory, which is scarce


def _to_host(
    ids: np.ndarray, hashes: np.ndarray, skipped: list[str], labels: _HostCopy, top5: _HostCopy, log_probs: _HostCopy
) -> ClassifiedBatch:
    return ClassifiedBatch(ids, hashes, labels.wait(), top5.wait(), log_probs.wait(), skipped)


class _Rows:
    """Arrays (B, …) of batches, joined while they arrive: the whole is in memory once, besides a 32nd in reserve."""

    def __init__(self) -> None:
        self._rows, self._count = np.empty(0, np.float32), 0

    def append(self, rows: np.ndarray) -> None:
        end = self._count + len(rows)
        if end > len(self._rows):
            # For a large array the operating system moves the pages, and copies nothing.
            self._rows.resize((end + end // 32, *rows.shape[1:]), refcheck=False)
        self._rows[self._count : end] = rows
        self._count = end

    def take(self) -> np.ndarray:
        """All rows; none are left."""
        rows, count = self._rows, self._count
        self._rows, self._count = np.empty(0, np.float32), 0
        rows.resize((count, *rows.shape[1:]), refcheck=False)
        return rows


class ClassifierEvaluation(Evaluation[ClassifiedBatch]):
    """Collects the log-probabilities of every image at every point; the model is a classifier.

    The host reads the results of a batch while the device computes the next one.

    Args:
        model, reduction, points: see :class:`Evaluation`.
        cuda_graph: run the model as ``mtr_lab.compile`` does.
    """

    kind = Classifications

    def __init__(
        self, model: Any, reduction: Reduction, points: Sequence[OperatingPoint], cuda_graph: bool = False
    ) -> None:
        super().__init__(model, reduction, points)
        # Four graphs a point: of a full batch, of the last one, and for the timing of a batch and of one image.
        self._classify = compile(model, max_graphs=4 * max(len(points), 1)) if cuda_graph else model.__call__
        self._pending: Callable[[], ClassifiedBatch] | None = None
        self._log_probs = _Rows()  # (n, p, K)

    def forward_at(self, point: OperatingPoint, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, K) at one point."""
        self.reduction.use(point.schedule)
        return self._classify(images)

    def test_step(self, batch: Mapping[str, Any], index: int) -> None:
        images = batch["image"]
        log_probs = torch.empty(len(self.points), len(images), self.model.num_classes)
        if len(images) and self.points:
            logits = torch.stack([self._in_parts(point, images) for point in self.points_in_turn()])
            log_probs = logits.float().log_softmax(-1)
        copies = map(_HostCopy, (batch["label"], top_classes(log_probs), log_probs))
        # Only host data and copies: a reference to the batch would keep its images on the device.
        pending = partial(_to_host, batch["id"], batch["hash"], batch["skipped"], *copies)
        self._keep_pending()
        self._pending = pending

    def _in_parts(self, point: OperatingPoint, images: Tensor) -> Tensor:
        return torch.cat(self.in_parts(lambda part: self.forward_at(point, images[part]), len(images)))

    def receive(self, results: ClassifiedBatch) -> None:
        self._log_probs.append(results.log_probs.swapaxes(0, 1))
        super().receive(results._replace(log_probs=np.empty(0, np.float32)))

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._pending, self._log_probs = None, _Rows()

    def on_test_epoch_end(self) -> None:
        self._keep_pending()

    def _keep_pending(self) -> None:
        """Keep the results of the previous batch."""
        if self._pending is not None:
            self.keep(self._pending())
            self._pending = None

    def predictions(self) -> Classifications:
        images = self.image_names()
        log_probs = self._log_probs.take().swapaxes(0, 1)
        sums = log_probs.sum(axis=2, dtype=np.float64)  # a whole array of truth values would take a quarter of it
        for point, finite in zip(self.points, np.isfinite(sums), strict=True):
            if not finite.all():
                raise UserError(
                    f"the model's outputs at {point.name} are infinite or not a number for {(~finite).sum()} of "
                    f"{len(finite)} images: use another precision (trainer.precision=32-true), or other weights."
                )
        return self.kind(
            **images,
            labels=np.concatenate([results.labels for results in self.results]),
            points=np.array([point.name for point in self.points]),
            top5=np.concatenate([results.top5 for results in self.results], axis=1),
            log_probs=log_probs,
        )
