"""Export a model to a file that is verified before it gets its name."""

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtr_lab.data.pictures import prepare, sample_pictures
from mtr_lab.errors import UserError, machine_error
from mtr_lab.export.deployable import Deployable, Description, backbone_of, describe
from mtr_lab.export.formats import FORMATS, OPSETS, check_request
from mtr_lab.export.onnx_file import OnnxFile, to_onnx
from mtr_lab.export.torch_file import TorchFile, compiled_content, program_content, to_program
from mtr_lab.export.tracing import innermost_message
from mtr_lab.export.verification import HALF_TOLERANCE, TOLERANCES, Parity, verify
from mtr_lab.results.atomic import check_output, write_output

OPSET = OPSETS[0]
ENDINGS = {".onnx": "onnx", ".pt2": "pt2"}
"""The format that the ending of a file's name stands for."""


@dataclass(frozen=True)
class Exported:
    """A file that was written."""

    file: Path
    description: Description
    parity: Parity
    nodes: int
    """Of its graph."""


def export_model(
    model: nn.Module,
    file: str | Path,
    *,
    format: str | None = None,
    precision: str = "float32",
    batch: int | None = None,
    opset: int = OPSET,
    task: str = "classification",
    name: str | None = None,
    plans: bool = False,
) -> Exported:
    """Write a model, reduced as it is patched, to a file that runs without this library.

        mtr_lab.patch(model, "mtr", ratio=0.4)
        mtr_lab.export_model(model, "vim_s.onnx")

    The file takes normalised images (B, channels, H, W) in float32 of the model's own size; its first output are the
    logits in float32: (B, classes), of a segmenter (B, classes, H, W). It says of itself how pictures are prepared. It
    is compared with the model, and gets its name only if both agree.

    Args:
        model: a model that ``mtr_lab.patch`` accepts, patched or not, or a segmenter; on the CPU. Unchanged.
        file: NAME.onnx or NAME.pt2.
        format: ``onnx``, ``pt2``, or ``aotinductor``: compiled for this processor, and a .pt2 file, too. By default
            that of the file's ending.
        precision: ``float32``, or ``float16`` for GPUs: weights and streams; states of scans stay in float32.
        batch: the number of images of every call; ``None`` for any.
        opset: of ONNX, 18 at least.
        task: of the model, in the description.
        name: of the model, in the description.
        plans: ONNX only: return the plans of the blocks, too: for each, in turn, the destination of every token
            (B, L) int64 (-1: dropped), its weight (B, L), and the positions of the survivors (B, M) int64.

    Returns:
        The file, its description, and how well it agrees with the model.

    Raises:
        UserError: an unknown format or precision, an old opset, a missing package, a model of videos, a policy that the
            format cannot express, a path that cannot be a file's, or a file that does not compute what the model does.
        MachineError, OSError: the machine refuses to write the file.
    """
    file = Path(file)
    format = format or format_of(file)
    check_request(format, precision, batch, opset)
    check_output(file)
    check_exportable(model, format)
    if next(model.parameters()).device.type != "cpu":
        raise UserError("export traces the model on the CPU: move it there first, model.cpu().")
    if not hasattr(model, "backbone"):
        model = backbone_of(model)  # in the place of an object of the authors' class
    copied = copy.deepcopy(model).eval().requires_grad_(False).to(getattr(torch, precision))
    description = describe(copied, task, name or type(backbone_of(model)).__name__, precision, batch)
    images = verification_images(description)
    batches = list(images.split(batch)) if batch else [images[:1], images[1:]]
    tolerance = HALF_TOLERANCE if precision == "float16" else TOLERANCES["onnx" if format == "onnx" else "pt2"]
    deployable = Deployable(copied, plans=format == "onnx").eval()
    example = images[: batch or 2]
    with tempfile.TemporaryDirectory(prefix="mtr_lab_export_") as folder:
        if format == "onnx":
            import onnx

            translated = to_onnx(deployable, example, description, opset)
            content = translated.content(plans=True)
            parity = verify(copied, OnnxFile(content).outputs, batches, tolerance)
            content = translated.content(plans=plans)
            onnx.checker.check_model(content, full_check=True)
            nodes = len(translated.program.graph)
        else:
            program = to_program(deployable, example, description)
            nodes = len(program.graph.nodes)
            if format == "pt2":
                content = program_content(program, description)
            else:
                content = compiled_content(program, description, Path(folder))
            written = Path(folder) / f"written{FORMATS[format]}"
            written.write_bytes(content)
            run = TorchFile(written)
            parity = verify(copied, lambda given: [run(given)], batches, tolerance)
    write_output(file, content)
    return Exported(file, description, parity, nodes)


def format_of(file: Path) -> str:
    """The format that a file's ending names; raises a ``UserError`` if it names none."""
    if file.suffix not in ENDINGS:
        raise UserError(f"{file}: expected a name that ends in .onnx or .pt2, or format= one of {[*FORMATS]}.")
    return ENDINGS[file.suffix]


def check_exportable(model: nn.Module, format: str) -> None:
    """Raise a ``UserError`` if models like this one are not exported; says why."""
    backbone: Any = backbone_of(model)
    if len(backbone.input_shape) != 3:
        raise UserError("only models that take images can be exported: leave num_frames out.")
    policy = getattr(backbone.reduction, "acting_policy", None)
    if policy is not None and policy.draws:
        raise UserError(
            f"policy {policy.policy} draws random numbers at every call, which a file of format={format} cannot do: "
            "choose another policy."
        )


def verification_images(description: Description) -> Tensor:
    """Bundled pictures as the model sees them, (B, channels, H, W); noise if it does not take three channels."""
    # Every pixel of a dense task is an output, and its images are large.
    count = description.batch or (6 if description.task == "classification" else 2)
    if description.input_size[0] != 3:
        return torch.randn(count, *description.input_size, generator=torch.Generator().manual_seed(0))
    return torch.stack([prepare(picture, description.data_config) for picture in sample_pictures(count)])


@dataclass(frozen=True)
class ExportedModel:
    """A file of :func:`export_model` that can be called: normalised images (B, channels, H, W) to the first output."""

    file: Path
    description: Description
    run: OnnxFile | TorchFile

    def __call__(self, images: Tensor) -> Tensor:
        """Raises a ``UserError`` for images of another size or number than the file takes, or a file that fails."""
        about, shape = self.description, tuple(images.shape)
        if shape[1:] != tuple(about.input_size) or about.batch not in (None, *shape[:1]):
            size = ", ".join(map(str, about.input_size))
            raise UserError(f"images of shape {shape}: the file takes ({about.batch or 'B'}, {size}).")
        try:
            return self.run(images)
        except Exception as error:  # the runtimes raise errors of many types
            if machine_error(error) is not None:
                raise
            raise UserError(
                f"{self.file} fails on images of the size that it states: {innermost_message(error)}."
            ) from error


def read_exported(file: Path) -> ExportedModel:
    """Read a file of :func:`export_model`.

    Raises:
        UserError: the file is missing, damaged, or not of this library.
    """
    if file.suffix not in ENDINGS:
        raise UserError(f"{file}: expected a file of mtr-lab export, which ends in .onnx or .pt2.")
    run: OnnxFile | TorchFile = OnnxFile(file) if file.suffix == ".onnx" else TorchFile(file)
    if not run.metadata:
        raise UserError(f"{file} does not say how pictures are prepared for it: export it with mtr-lab export.")
    try:
        return ExportedModel(file, Description.read(run.metadata), run)
    except ValueError as error:
        raise UserError(f"{file}: its description does not fit this version of mtr_lab: {error}.") from error
