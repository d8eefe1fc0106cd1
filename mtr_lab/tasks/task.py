"""What the programs ask of a task, so that they know nothing of any one of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Protocol

from lightning import LightningModule
from omegaconf import DictConfig
from torch import Tensor, nn

from mtr_lab.backbones import Backbone
from mtr_lab.backbones.weights import checkpoint_label_names, is_meta, load_weights
from mtr_lab.errors import UserError
from mtr_lab.pictures import Observation
from mtr_lab.reduction import Reduction
from mtr_lab.results.metrics import score, task_metrics
from mtr_lab.results.predictions import Predictions
from mtr_lab.tasks.evaluation import OperatingPoint

ASSETS = Path(str(resources.files("mtr_lab") / "assets"))
CreateBackbone = Callable[..., Any]
"""Makes the backbone of the configuration; takes changes to it, as ``create_model``."""
Observe = Callable[[Tensor], list[Observation]]
"""Images (B, 3, H, W) to what the reduction in force does to each."""


class Evaluation(Protocol):
    """A Lightning module whose ``test_step`` runs a batch at every point, the unreduced model's first.

    ``skipped`` are the names of the images that could not be read, ``predictions()`` is what was found in all others:
    a dataclass of arrays in ``mtr_lab.report`` with ``ids``, ``hashes``, ``labels``, ``points``, ``select`` and
    ``concat``. It raises a ``UserError`` where there is none, or the model's outputs are not numbers. Both are of
    all processes on rank 0, after ``gather()``.
    """

    @property
    def model(self) -> nn.Module: ...
    @property
    def reduction(self) -> Reduction: ...
    @property
    def points(self) -> Sequence[OperatingPoint]: ...
    @property
    def skipped(self) -> list[str]: ...

    def forward_at(self, point: OperatingPoint, images: Tensor) -> object:
        """What is timed: images (B, 3, H, W) of the model's input size, at one point."""
        ...

    def gather(self) -> None:
        """Bring what all processes have found to rank 0, in the order of the images; to be called in each."""
        ...

    def predictions(self) -> Any: ...


class Task(ABC):
    """One task: its model, its data's arguments, its evaluation, its training, its pictures.

    A new one is a subclass, an entry of ``mtr_lab.compose.TASKS``, conf/task/NAME.yaml (``# @package _global_``: the
    settings below ``task``, a default dataset), a datamodule for conf/dataset, which has ``class_names``,
    ``num_classes``, ``fingerprint()`` and the loaders, and a kind of predictions in ``mtr_lab.results.predictions``.

    Args:
        settings: the ``task`` group without its name.
    """

    name: ClassVar[str]
    datamodule: ClassVar[type]
    """What the ``dataset`` group has to make."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)

    @property
    def metrics(self) -> list[str]:
        """Keys of a point in the result that an ``objective`` may name."""
        return [metric.key for metric in task_metrics(self.name)]

    def check(self, trainer: DictConfig) -> None:
        """Raise a ``UserError`` for settings of the ``trainer`` group that the task cannot be carried out with."""
        return None

    def check_training(self, config: DictConfig) -> None:
        """Raise a ``UserError`` for settings that the task cannot be trained with."""
        return None

    @abstractmethod
    def backbone(self, model: Any) -> Any:
        """What a policy reduces of the task's model; its ``weights`` say where the whole model's are from."""

    @abstractmethod
    def checkpoint(self, backbone: DictConfig) -> Path | None:
        """The file of the whole model's weights; ``None`` if the backbone's own loading does it, or for random ones.

        Raises:
            UserError: there is none for this backbone.
        """

    @abstractmethod
    def data_arguments(self, meta_model: Any, checkpoint: Path | None) -> dict[str, Any]:
        """What the datamodule is told about the model that is evaluated, besides ``data_config``."""

    def training_arguments(self) -> dict[str, Any]:
        """What the datamodule is told for training, besides ``data_config`` and ``seed``."""
        return {}

    @abstractmethod
    def evaluated_model(self, create: CreateBackbone, checkpoint: Path | None, num_classes: int) -> nn.Module:
        """The model with its weights; on the meta device its meta_model, which finds mistakes in the settings."""

    @abstractmethod
    def trained_model(self, create: CreateBackbone, num_classes: int) -> nn.Module:
        """The model to train, on a backbone that may have weights."""

    @abstractmethod
    def evaluation(
        self, model: Any, reduction: Reduction, points: Sequence[OperatingPoint], cuda_graph: bool
    ) -> Evaluation:
        """What evaluates the model, patched by ``reduction``, at points; without any the images are only read."""

    def score(self, predictions: Predictions, point: int) -> dict[str, Any]:
        """See ``mtr_lab.results.metrics.score``."""
        return score(predictions, point)

    def head_flops(self, model: Any) -> int | None:
        """True FLOPs of what a dense task adds to the backbone, for one image; ``None`` where nothing is apart."""
        return None

    @abstractmethod
    def training(self, model: Any, config: DictConfig) -> LightningModule:
        """What trains ``model``, its attribute, as the ``training`` group says; ``skipped`` names unreadable images."""

    def single_images(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Every image of a batch for evaluation as a batch of its own."""
        for i in range(len(batch["id"])):
            yield {key: value[i : i + 1] for key, value in batch.items() if key != "skipped"}

    @abstractmethod
    def draw(
        self,
        evaluation: Any,
        image: Mapping[str, Any],
        observe: Observe,
        points: Sequence[OperatingPoint],
        class_names: Sequence[str],
        stem: Path,
    ) -> None:
        """Draw one image to ``stem``.png and the like.

        Args:
            evaluation: with the reduction of the last of ``points`` in force.
            image: a batch of this image alone, on the device.
            observe: what the reduction in force does to images.
            points: to show, the unreduced model first.
        """


def adamw_settings(config: DictConfig) -> dict[str, Any]:
    """What every task's training takes of the ``training`` group, see ``adamw``."""
    return {name: config.training[name] for name in ("lr", "weight_decay", "warmup_epochs")}


class DenseTask(Task):
    """A task whose model is a ``backbone`` and a ``head``, stored together: ``backbone.*``, ``head.*``.

    The head has ``num_classes`` and ``flops(height, width)``.
    """

    bundled: ClassVar[str]
    """BACKBONE_<bundled>.safetensors in the package's assets are the whole model's weights."""

    @abstractmethod
    def assemble(self, backbone: Backbone, num_classes: int) -> nn.Module:
        """The model on a backbone, its head untrained.

        Raises:
            UserError: settings that are unknown, or cannot be had.
        """

    def backbone(self, model: Any) -> Any:
        return model.backbone

    def checkpoint(self, backbone: DictConfig) -> Path | None:
        if backbone.checkpoint is not None:
            return Path(str(backbone.checkpoint)).expanduser()
        if not backbone.pretrained:
            return None
        bundled = ASSETS / f"{backbone.name}_{self.bundled}.safetensors"
        if not bundled.is_file():
            raise UserError(
                f"no weights for {self.name} with {backbone.name} are bundled: give those of a run of python -m "
                f"mtr_lab.train task={self.name} (backbone.checkpoint=RUN/model.safetensors), or "
                "backbone.pretrained=false for random ones."
            )
        return bundled

    def data_arguments(self, meta_model: Any, checkpoint: Path | None) -> dict[str, Any]:
        names = None if checkpoint is None else checkpoint_label_names(checkpoint)
        return {"model_classes": names, "num_classes": None if names is None else len(names)}

    def evaluated_model(self, create: CreateBackbone, checkpoint: Path | None, num_classes: int) -> nn.Module:
        model: Any = self.assemble(create(pretrained=False, checkpoint=None), num_classes)
        if checkpoint is not None and not is_meta(model.backbone):
            load_weights(model.backbone, checkpoint, whole=model)
        return model.eval()

    def trained_model(self, create: CreateBackbone, num_classes: int) -> nn.Module:
        return self.assemble(create(), num_classes)

    def head_flops(self, model: Any) -> int | None:
        return model.head.flops(*model.backbone.input_shape[-2:])
