"""The interface of a task, by which the programs handle classification, detection and segmentation alike."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from lightning import LightningModule
from omegaconf import DictConfig
from torch import Tensor, nn

from mtr_lab.backbones import Backbone
from mtr_lab.backbones.weights import Checkpoint, checkpoint_label_names, load_weights
from mtr_lab.data.shard import EvaluationImages
from mtr_lab.errors import UserError
from mtr_lab.pictures import Observation
from mtr_lab.reduction import Reduction
from mtr_lab.results.metrics import score, task_metrics
from mtr_lab.results.predictions import Predictions
from mtr_lab.tasks.evaluation import Evaluation, OperatingPoint

ASSETS = Path(str(resources.files("mtr_lab") / "assets"))
CreateBackbone = Callable[..., Any]
"""Makes the configured backbone; keywords change its configuration, as those of ``create_model``."""


class DataModule(EvaluationImages, Protocol):
    """What an evaluation reads of a task's data module, a ``LightningDataModule``."""

    name: str
    """Of the dataset, in results and messages."""

    @property
    def class_names(self) -> Sequence[str] | None: ...
    @property
    def num_classes(self) -> int | None: ...

    def fingerprint(self) -> str:
        """A hash that changes when the evaluation images or their labels do."""
        ...

    def calibration_images(self, count: int) -> Tensor:
        """Training images (count, 3, H, W), prepared as for evaluation."""
        ...


Model = TypeVar("Model", bound=nn.Module)
TaskEvaluation = TypeVar("TaskEvaluation", bound=Evaluation[Any])


@dataclass(frozen=True)
class Drawing(Generic[TaskEvaluation]):
    """One image to draw at several operating points."""

    evaluation: TaskEvaluation
    """The reduction of the last of ``points`` is in force."""
    image: Mapping[str, Any]
    """A batch of this image alone, on the device."""
    observe: Callable[[Tensor], list[Observation]]
    """Images (B, 3, H, W) to what the reduction in force does to their tokens."""
    points: Sequence[OperatingPoint]
    """The unreduced model's first."""
    class_names: Sequence[str]
    stem: Path
    """The pictures are ``stem``.png and the like."""


class Task(ABC, Generic[Model, TaskEvaluation]):
    """A task: its model, the arguments of its data, its evaluation, its training, its pictures.

    A new task is a subclass, an entry of ``mtr_lab.compose.TASKS``, conf/task/NAME.yaml (``# @package _global_``: the
    settings below ``task``, a default dataset), a :class:`DataModule` for conf/dataset, and a kind of predictions in
    ``mtr_lab.results.predictions``.

    Args:
        settings: the ``task`` group without its name.
    """

    name: ClassVar[str]
    datamodule: ClassVar[type]
    """The class of data modules that the ``dataset`` group has to name."""
    takes_videos: ClassVar[bool] = False
    """Whether the model gets videos instead of images."""
    has_teacher: ClassVar[bool] = False
    """Whether a model can learn from a trained one while it trains (``training.teacher``)."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)

    @property
    def metrics(self) -> list[str]:
        """Keys of a point in the result that an ``objective`` may name."""
        return [metric.key for metric in task_metrics(self.name)]

    def check(self, trainer: DictConfig) -> None:
        """Raise a ``UserError`` for settings of the ``trainer`` group under which the task cannot be evaluated."""
        return None

    def check_training(self, config: DictConfig, devices: int) -> None:
        """Raise a ``UserError`` for settings under which the task cannot be trained on this number of devices."""
        if config.dataset.batch_size % devices:
            raise UserError(
                f"dataset.batch_size={config.dataset.batch_size} is divided equally among {devices} devices: choose a "
                f"multiple of {devices}."
            )
        if config.trainer.cuda_graph and config.trainer.get("accumulate_grad_batches", 1) != 1:
            raise UserError(
                f"trainer.accumulate_grad_batches={config.trainer.accumulate_grad_batches}: a CUDA graph keeps the "
                "gradients of one batch alone. Set trainer.cuda_graph=false."
            )
        if config.training.teacher is not None and not self.has_teacher:
            raise UserError(
                f"training.teacher={config.training.teacher}: only a classifier of images learns from a teacher, and "
                f"this is task={self.name}. Set training.teacher=null."
            )

    @abstractmethod
    def assemble(self, backbone: Any, num_classes: int) -> Model:
        """The task's model on a backbone, its head untrained; the classifier is the backbone itself.

        Raises:
            UserError: unknown or impossible settings.
        """

    @abstractmethod
    def backbone(self, model: Model) -> Any:
        """The part of the model that a policy reduces; its ``weights`` record the source of the whole model's."""

    @abstractmethod
    def checkpoint(self, backbone: DictConfig) -> Checkpoint | None:
        """The file with the whole model's weights; ``None`` if the backbone loads its own, or they are random.

        Raises:
            UserError: no weights exist for this backbone.
        """

    @abstractmethod
    def data_arguments(self, meta_model: Any, checkpoint: Checkpoint | None) -> dict[str, Any]:
        """Arguments of the data module for an evaluation, besides ``data_config``.

        Args:
            meta_model: the backbone on the meta device.
            checkpoint: see :meth:`checkpoint`.
        """

    def training_arguments(self, meta_model: Any) -> dict[str, Any]:
        """Arguments of the data module for training, besides ``data_config`` and ``seed``."""
        return {}

    @abstractmethod
    def evaluated_model(self, create: CreateBackbone, checkpoint: Checkpoint | None, num_classes: int) -> Model:
        """The model with its weights, in evaluation mode."""

    @abstractmethod
    def trained_model(self, create: CreateBackbone, num_classes: int) -> Model:
        """The model to train; its backbone may have weights."""

    @abstractmethod
    def evaluation(
        self, model: Model, reduction: Reduction, points: Sequence[OperatingPoint], cuda_graph: bool
    ) -> TaskEvaluation:
        """The evaluation of the model at points; ``reduction`` is the handle of its patched backbone."""

    def score(self, predictions: Predictions, point: int) -> dict[str, Any]:
        """See ``mtr_lab.results.metrics.score``."""
        return score(predictions, point)

    def head_flops(self, model: Model) -> int | None:
        """True FLOPs of a dense task's head for one image; ``None`` of a classifier, whose backbone contains it."""
        return None

    @abstractmethod
    def training(self, model: Model, config: DictConfig) -> LightningModule:
        """The module that trains ``model`` by the ``training`` group; its ``skipped`` names unreadable images."""

    def single_images(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Split an evaluation batch into batches of one image."""
        for i in range(len(batch["id"])):
            yield {key: value[i : i + 1] for key, value in batch.items() if key != "skipped"}

    @abstractmethod
    def draw(self, drawing: Drawing[TaskEvaluation]) -> None:
        """Draw one image at several operating points."""


AnyTask = Task[Any, Any]


def adamw_settings(config: DictConfig) -> dict[str, Any]:
    """The arguments of ``adamw`` out of the ``training`` group."""
    return {name: config.training[name] for name in ("lr", "weight_decay", "warmup_epochs")}


class DenseTask(Task[Model, TaskEvaluation]):
    """A task whose model is a ``backbone`` and a ``head``, stored together: ``backbone.*``, ``head.*``.

    The head has ``num_classes`` and ``flops(height, width)``.
    """

    bundled: ClassVar[str]
    """BACKBONE_<bundled>.safetensors in the package's assets has the whole model's weights."""

    def backbone(self, model: Any) -> Any:
        return model.backbone

    def checkpoint(self, backbone: DictConfig) -> Checkpoint | None:
        if backbone.checkpoint is not None:
            key, grid = backbone.get("checkpoint_key"), backbone.get("checkpoint_grid")
            return Checkpoint(str(backbone.checkpoint), backbone.revision, key, grid)
        if not backbone.pretrained:
            return None
        bundled = ASSETS / f"{backbone.name}_{self.bundled}.safetensors"
        if not bundled.is_file():
            raise UserError(
                f"no weights for {self.name} with {backbone.name} are bundled: give those of a run of python -m "
                f"mtr_lab.train task={self.name} (backbone.checkpoint=RUN/model.safetensors), or "
                "backbone.pretrained=false for random ones."
            )
        return Checkpoint(str(bundled))

    def data_arguments(self, meta_model: Backbone, checkpoint: Checkpoint | None) -> dict[str, Any]:
        names = None if checkpoint is None else checkpoint_label_names(checkpoint.file, checkpoint.revision)
        return {"model_classes": names, "num_classes": None if names is None else len(names)}

    def evaluated_model(self, create: CreateBackbone, checkpoint: Checkpoint | None, num_classes: int) -> Model:
        model: Any = self.assemble(
            create(pretrained=False, checkpoint=None, checkpoint_key=None, checkpoint_grid=None), num_classes
        )
        if checkpoint is not None:
            load_weights(model.backbone, checkpoint, whole=model)
        return model.eval()

    def trained_model(self, create: CreateBackbone, num_classes: int) -> Model:
        return self.assemble(create(), num_classes)

    def head_flops(self, model: Any) -> int | None:
        return model.head.flops(*model.backbone.input_shape[-2:])
