"""Classification as a task: the model is the backbone with its own head."""

from collections.abc import Sequence
from typing import Any, ClassVar

from lightning import LightningModule
from omegaconf import DictConfig

from mtr_lab.backbones.weights import Checkpoint, is_meta
from mtr_lab.data import ImageDataModule
from mtr_lab.errors import UserError, check_number
from mtr_lab.pictures import save_depth
from mtr_lab.reduction import Reduction
from mtr_lab.tasks.classification.distillation import Teacher, check_teacher, load_teacher
from mtr_lab.tasks.classification.evaluation import ClassifierEvaluation
from mtr_lab.tasks.classification.training import ClassifierTraining
from mtr_lab.tasks.evaluation import OperatingPoint
from mtr_lab.tasks.task import CreateBackbone, Drawing, Task, adamw_settings


class Classification(Task[Any, ClassifierEvaluation]):
    """Classification: the backbone is the whole model, evaluated by its log-probabilities.

    Args:
        settings: empty, as the task has none.
    """

    name = "classification"
    datamodule: ClassVar[type] = ImageDataModule
    evaluation_type: ClassVar[type[ClassifierEvaluation]] = ClassifierEvaluation
    training_type: ClassVar[type[ClassifierTraining]] = ClassifierTraining
    has_teacher = True

    def check_training(self, config: DictConfig, devices: int) -> None:
        super().check_training(config, devices)
        if (config.training.mixup or config.training.cutmix) and config.dataset.batch_size // devices % 2:
            even = "an even number" if devices == 1 else f"a multiple of {2 * devices}"
            raise UserError(
                f"dataset.batch_size={config.dataset.batch_size}: mixup and cutmix mix the images of a batch in pairs. "
                f"Choose {even}, or training.mixup=0 training.cutmix=0."
            )
        check_number("training.distillation", config.training.distillation, float, 0, 1)
        check_number("training.temperature", config.training.temperature, float, 0.1, 100)
        if config.training.teacher is not None:
            check_teacher(str(config.training.teacher))

    def assemble(self, backbone: Any, num_classes: int) -> Any:
        return backbone

    def backbone(self, model: Any) -> Any:
        return model

    def checkpoint(self, backbone: DictConfig) -> Checkpoint | None:
        return None

    def data_arguments(self, meta_model: Any, checkpoint: Checkpoint | None) -> dict[str, Any]:
        return {"model_classes": meta_model.pretrained_cfg["label_names"], "num_classes": meta_model.num_classes}

    def evaluated_model(self, create: CreateBackbone, checkpoint: Checkpoint | None, num_classes: int) -> Any:
        return create().eval()

    def trained_model(self, create: CreateBackbone, num_classes: int) -> Any:
        return create(num_classes=num_classes, new_head=True)

    def evaluation(
        self, model: Any, reduction: Reduction, points: Sequence[OperatingPoint], cuda_graph: bool
    ) -> ClassifierEvaluation:
        return self.evaluation_type(model, reduction, points, cuda_graph)

    def training(self, model: Any, config: DictConfig) -> LightningModule:
        settings = config.training
        return self.training_type(
            model,
            **adamw_settings(config),
            label_smoothing=settings.label_smoothing,
            mixup=settings.mixup,
            cutmix=settings.cutmix,
            teacher=make_teacher(model, settings),
            distillation=settings.distillation,
            temperature=settings.temperature,
            cuda_graph=config.trainer.cuda_graph,
        )

    def draw(self, drawing: Drawing[ClassifierEvaluation]) -> None:
        (observation,) = drawing.observe(drawing.image["image"])
        save_depth(observation, None, drawing.stem, outcome(drawing))


def make_teacher(model: Any, settings: DictConfig) -> Teacher | None:
    """What a student learns from, if anything; nothing on the meta device, where only settings are checked."""
    if settings.teacher is None or is_meta(model):
        return None
    return Teacher(load_teacher(str(settings.teacher), model.num_classes), model.pretrained_cfg)


def outcome(drawing: Drawing[Any]) -> str:
    """What the model takes the image or video for at each point, the divergence from the first point, the truth."""
    images, names = drawing.image["image"], drawing.class_names
    log_probs = [drawing.evaluation.forward_at(point, images)[0].float().log_softmax(-1) for point in drawing.points]

    def named(index: int) -> str:
        return str(names[index]) if 0 <= index < len(names) else f"class {index}"

    lines = [f"truth: {named(int(drawing.image['label'][0]))}"]
    for point, values in zip(drawing.points, log_probs, strict=True):
        best = int(values.argmax())
        line = f"{point.words}: {named(best)}, {100 * float(values[best].exp()):.0f} %"
        if point is not drawing.points[0]:
            kl = float((log_probs[0].exp() * (log_probs[0] - values)).sum())
            line += f", KL divergence {kl:.3f} nats"
        lines.append(line)
    return "\n".join(lines)
