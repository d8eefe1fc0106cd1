"""Evaluation of a video classifier: the logits of all views of a video are averaged."""

from torch import Tensor

from mtr_lab.results.classifications import VideoClassifications
from mtr_lab.tasks.classification.evaluation import ClassifierEvaluation
from mtr_lab.tasks.evaluation import OperatingPoint


def average_views(logits: Tensor, videos: int) -> Tensor:
    """Logits of all views (videos · views, K) to those of the videos (videos, K)."""
    return logits.unflatten(0, (videos, -1)).mean(1)


class VideoEvaluation(ClassifierEvaluation):
    """Collects the log-probabilities of every video at every point, as ``ClassifierEvaluation`` does of images."""

    kind = VideoClassifications

    def forward_at(self, point: OperatingPoint, images: Tensor) -> Tensor:
        """Views (B, views, C, T, H, W) to logits (B, K) at one point."""
        return average_views(super().forward_at(point, images.flatten(0, 1)), len(images))
