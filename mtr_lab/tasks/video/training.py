"""Training a video classifier."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mtr_lab.tasks.classification.training import ClassifierTraining
from mtr_lab.tasks.video.evaluation import average_views
from mtr_lab.tasks.video.head import StandardisedHead


class VideoTraining(ClassifierTraining):
    """As ``ClassifierTraining``; mixup and cutmix mix all frames of two clips alike.

    The mean over tokens is standardised before a new head, see ``StandardisedHead``; at the end of the fit the head is
    a linear layer again.
    """

    def __init__(self, model: Any, **settings: Any) -> None:
        if model.global_pool == "avg":
            model.head = StandardisedHead(model.head)
        super().__init__(model, **settings)
        if self.mixup is not None:
            self.mixup = _MixFrames(self.mixup)

    def on_fit_end(self) -> None:
        if isinstance(self.model.head, StandardisedHead):
            self.model.head = self.model.head.folded()

    def logits_of(self, batch: Mapping[str, Any]) -> Tensor:
        """The logits (B, K) of a validation batch of views (B, views, C, T, H, W)."""
        return average_views(self.model(batch["image"].flatten(0, 1)), len(batch["image"]))


class _MixFrames:
    """Mixes videos (B, C, T, H, W) by what mixes images: their frames are like more channels."""

    def __init__(self, mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self._mix = mix

    def __call__(self, clips: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        mixed, labels = self._mix(clips.flatten(1, 2), labels)
        return mixed.unflatten(1, clips.shape[1:3]), labels
