"""ONNX files: written with operators of the standard alone, read with ONNX Runtime."""

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtr_lab.errors import UserError
from mtr_lab.export.deployable import INPUT, OUTPUT, Deployable, Description
from mtr_lab.export.tracing import exported_program, innermost_message
from mtr_lab.packages import require

METADATA = "mtr_lab"
"""The key of the metadata that holds the description as JSON."""


class Onnx(NamedTuple):
    """A model in ONNX that has no file yet."""

    program: Any
    """``onnx_ir.Model``."""
    plans: list[str]
    """The names of the outputs that only the verification reads."""

    def content(self, *, plans: bool) -> bytes:
        """The file. Its first output is the model's; with ``plans`` the tensors of the plans follow."""
        import onnx_ir

        outputs = self.program.graph.outputs
        extra = [value for value in outputs if value.name in self.plans]
        for value in () if plans else extra:
            outputs.remove(value)
        content: bytes = onnx_ir.to_proto(self.program).SerializeToString()
        return content


def to_onnx(deployable: Deployable, images: Tensor, description: Description, opset: int) -> Onnx:
    """Translate a model.

    Args:
        images: an example; its batch size is that of the file if the description gives one.

    Raises:
        UserError: the model or its policy does something that ONNX cannot express; says what.
    """
    # Translated as a whole: their parts are more nodes, and take minutes to trace.
    whole = ["selective_scan", "causal_conv1d"]
    program = exported_program(deployable, images, description.batch is None, whole)
    plans = [f"plan{number}" for number in range(len(program.graph_signature.user_outputs) - 1)]
    names = {"input_names": [INPUT], "output_names": [OUTPUT, *plans]}
    shapes = {"dynamic_shapes": ({0: "batch"},)} if description.batch is None else {}
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            translated: Any = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=opset,
                custom_translation_table=translations(),
                external_data=False,
                verbose=False,
                optimize=False,
                **names,  # type: ignore[arg-type]
                **shapes,  # type: ignore[arg-type]
            )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(
            f"format=onnx: {description.model} with policy {description.policy} has an operation without a translation "
            f"({innermost_message(error)}). Choose another policy, or format=pt2."
        ) from error
    model = translated.model
    simplify(model)
    model.producer_name = "mtr_lab"
    model.metadata_props[METADATA] = json.dumps(description.asdict())
    return Onnx(model, plans)


def simplify(model: Any) -> None:
    """Compute what is constant, and remove what is computed twice or not used.

    PyTorch's own optimiser also matches patterns of several nodes, in time that grows with the square of their number.
    """
    from onnx_ir.passes import Sequential, common
    from onnxscript.optimizer import fold_constants

    for _ in range(2):  # shapes that the first round finds make more values constant
        fold_constants(model, onnx_shape_inference=True, input_size_limit=2**30, output_size_limit=2**30)
        Sequential(
            common.IdentityEliminationPass(),
            common.CommonSubexpressionEliminationPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.DeduplicateInitializersPass(),
            common.RemoveUnusedNodesPass(),
        )(model)
    for node in model.graph:  # where in PyTorch it comes from, longer than the node itself
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def translations() -> dict[Any, Callable[..., Any]]:
    """The operators that PyTorch's exporter translates not at all, or less well."""
    from mtr_lab.export.onnx_scan import causal_conv1d, expm1, op, selective_scan

    def argsort(x: Any, stable: bool | None = True, dim: int = -1, descending: bool = False) -> Any:
        return sort(x, stable, dim, descending)[1]

    def sort(x: Any, stable: bool | None = True, dim: int = -1, descending: bool = False) -> Any:
        """TopK of all: ONNX puts the lower index first among equals, so that it is stable."""
        count = op.Slice(op.Shape(x), [dim % len(x.shape)], [dim % len(x.shape) + 1])
        return op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)

    def amax(x: Any, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
        return op.ReduceMax(x, list(dim), keepdims=int(keepdim)) if dim else op.ReduceMax(x, keepdims=int(keepdim))

    def rms_norm(x: Any, shape: Sequence[int], weight: Any | None = None, eps: float | None = None) -> Any:
        """With a division by the root, the form that ONNX Runtime fuses to one operator."""
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        mean = op.ReduceMean(op.Pow(x, 2.0), list(range(-len(shape), 0)))
        y = op.Div(x, op.Sqrt(op.Add(mean, eps)))
        return y if weight is None else op.Mul(y, weight)

    aten = torch.ops.aten
    return {
        torch.ops.mtr_lab.selective_scan.default: selective_scan,
        torch.ops.mtr_lab.causal_conv1d.default: causal_conv1d,
        aten.argsort.stable: argsort,
        aten.sort.stable: sort,
        aten.expm1.default: expm1,
        aten.amax.default: amax,
        aten.rms_norm.default: rms_norm,
    }


class OnnxFile:
    """An ONNX file that can be called: images (B, channels, H, W) in float32 to the first output.

    Args:
        source: the file, or its content.

    Raises:
        UserError: ONNX Runtime is missing, or cannot read the file.
    """

    def __init__(self, source: Path | bytes, threads: int | None = None) -> None:
        require("onnxruntime", "onnx", "an .onnx file")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        providers = [p for p in onnxruntime.get_available_providers() if p.startswith(("CUDA", "CPU"))]
        content: str | bytes = source if isinstance(source, bytes) else str(source)
        name = "the file" if isinstance(source, bytes) else str(source)
        if isinstance(source, Path) and not source.is_file():
            raise UserError(f"{source} {'is a folder' if source.is_dir() else 'does not exist'}.")
        try:
            self.session = onnxruntime.InferenceSession(content, options, providers=providers)
        except Exception as error:  # ONNX Runtime raises errors of many types
            raise UserError(f"{name} is not a readable ONNX file: {innermost_message(error)}.") from error
        self.metadata = self.session.get_modelmeta().custom_metadata_map.get(METADATA)
        self.input = self.session.get_inputs()[0]

    def outputs(self, images: Tensor) -> list[Tensor]:
        """All outputs."""
        results: Sequence[np.ndarray] = self.session.run(None, {self.input.name: images.float().numpy()})
        return [torch.from_numpy(result) for result in results]

    def __call__(self, images: Tensor) -> Tensor:
        return self.outputs(images)[0]
