"""``mtr-lab export``: the model that a configuration describes, reduced, in a file."""

from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mtr_lab.backbones.weights import checkpoint_label_names
from mtr_lab.compose import make_meta_model, make_model, make_task
from mtr_lab.errors import UserError
from mtr_lab.evaluation.points import policy_settings
from mtr_lab.export.formats import FORMATS
from mtr_lab.export.model import Exported, check_exportable, export_model
from mtr_lab.reduction import Reduction, measured_on_images
from mtr_lab.tasks.task import DenseTask


def export(config: DictConfig) -> Exported:
    """Export what ``conf/export.yaml`` describes; write BACKBONE.onnx or BACKBONE.pt2 to the run folder.

    Mistakes are reported before weights are loaded.

    Raises:
        UserError: the configuration has a mistake, or the file does not compute what the model does.
    """
    format = str(config.format)
    exported = export_model(
        configured_model(config),
        Path(HydraConfig.get().runtime.output_dir) / f"{config.backbone.name}{FORMATS[format]}",
        format=format,
        precision=str(config.precision),
        batch=config.batch,
        opset=config.opset,
        task=str(config.task.name),
        name=str(config.backbone.name),
    )
    print(summary(exported))
    return exported


def configured_model(config: DictConfig) -> Any:
    """The model that ``conf/export.yaml`` describes, with its weights, patched.

    Raises:
        UserError: the configuration has a mistake; reported before weights are loaded.
    """
    if config.task.name == "detection":
        raise UserError(
            "task=detection: a detector ends in a loop over its candidate boxes, which a file cannot contain. Export "
            "its backbone with task=classification, or a segmenter."
        )
    if measured := measured_on_images(config.mtr):
        raise UserError(
            f"{measured} measures on training images, which an export does not have: give the counts, mtr.ratio=null "
            "mtr.schedule=[…], as a result of mtr-lab eval states them."
        )
    task = make_task(config.task)
    patch(make_meta_model(config.backbone), config)
    checkpoint = task.checkpoint(config.backbone)
    names = None
    if isinstance(task, DenseTask):
        if checkpoint is None:
            raise UserError(f"task={task.name} needs weights: give backbone.checkpoint=FILE.")
        names = checkpoint_label_names(checkpoint.file, checkpoint.revision)
        if names is None:
            raise UserError(f"{checkpoint.file} does not name its classes: give weights that mtr-lab train wrote.")
    model: Any = task.evaluated_model(partial(make_model, config.backbone), checkpoint, len(names or ()))
    if names is not None:
        model.label_names = names
    patch(task.backbone(model), config)
    return model


def patch(backbone: Any, config: DictConfig) -> None:
    """Reduce the model as the ``mtr`` group says; with ``mtr.ratio=0`` not at all."""
    reduction = Reduction(backbone, policy_settings(config.mtr))
    reduction.use(reduction.solve(config.mtr.ratio))
    check_exportable(backbone, str(config.format))


def summary(exported: Exported) -> str:
    """What was written, and what the verification measured, in two lines."""
    about, parity = exported.description, exported.parity
    size = exported.file.stat().st_size / 1e6
    pixels = "pixels" if about.task == "segmentation" else "images"
    return (
        f"wrote {exported.file}: {size:.1f} MB, {exported.nodes} nodes, {about.precision}, policy {about.policy}, "
        f"{100 * about.ratio:.1f} % of the FLOPs removed\n"
        f"verified on {parity.images} images: largest error {parity.error:.1e} with the same plans; by its own "
        f"decisions {100 * parity.agreement:.1f} % of the {pixels} have the same class"
    )
