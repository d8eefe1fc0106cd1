"""Video classification as a task: the model is a backbone that takes videos."""

from typing import Any

from mtr_lab.backbones.weights import Checkpoint
from mtr_lab.data import VideoDataModule
from mtr_lab.data.video.sampling import check_model_takes_videos
from mtr_lab.pictures import save_clip
from mtr_lab.tasks.classification.task import Classification, outcome
from mtr_lab.tasks.task import Drawing
from mtr_lab.tasks.video.evaluation import VideoEvaluation
from mtr_lab.tasks.video.training import VideoTraining


class VideoClassification(Classification):
    """Video classification: the backbone is the whole model, evaluated by its log-probabilities."""

    name = "video"
    datamodule = VideoDataModule
    evaluation_type = VideoEvaluation
    training_type = VideoTraining
    takes_videos = True
    has_teacher = False

    def data_arguments(self, meta_model: Any, checkpoint: Checkpoint | None) -> dict[str, Any]:
        return {**super().data_arguments(meta_model, checkpoint), **self.training_arguments(meta_model)}

    def training_arguments(self, meta_model: Any) -> dict[str, Any]:
        check_model_takes_videos(meta_model.input_shape)
        return {"num_frames": meta_model.input_shape[1]}

    def draw(self, drawing: Drawing[VideoEvaluation]) -> None:  # type: ignore[override]
        """Draw the first view of the video, below the class that the model gives it at both points."""
        (observation,) = drawing.observe(drawing.image["image"][:, 0])
        save_clip(observation, None, drawing.stem, outcome(drawing))
