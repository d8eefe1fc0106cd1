"""One HTML file with everything in it: ONNX Runtime for browsers, the models, and one copy of their weights.

It opens from the file system, needs no server and sends the picture nowhere. All models share their weights, which are
stored once, in half precision where that loses nothing; a further operating point adds its graph alone.
"""

import base64
import gzip
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

import mtr_lab
from mtr_lab.data.classes import readable_name
from mtr_lab.data.pictures import sample_pictures
from mtr_lab.errors import UserError
from mtr_lab.export.formats import check_request
from mtr_lab.export.model import export_model
from mtr_lab.results.atomic import check_output, write_output

POINTS = (("mtr", 0.2), ("mtr", 0.3), ("mtr", 0.4), ("write", 0.4))
"""Policies and ratios, besides the unreduced model."""
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
"""Files of the npm package onnxruntime-web."""
SHARED = "weights.bin"


class Weights:
    """The weights of all models, without repetition."""

    def __init__(self) -> None:
        self.content = bytearray()
        self._places: dict[bytes, tuple[int, int]] = {}

    def move_out(self, content: bytes) -> bytes:
        """An ONNX file whose large tensors are in ``SHARED`` instead."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        model = onnx.load_from_string(content)
        casts = []
        for tensor in model.graph.initializer:
            values = numpy_helper.to_array(tensor)
            if values.dtype != np.float32 or values.nbytes < 1024:
                continue
            with np.errstate(over="ignore"):
                half = values.astype(np.float16)
            name, kind = tensor.name, TensorProto.FLOAT
            if np.array_equal(half.astype(np.float32), values):
                casts.append(helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT))
                values, name, kind = half, f"{name}_half", TensorProto.FLOAT16
            offset, length = self._place(values.tobytes())
            tensor.Clear()
            tensor.name, tensor.data_type, tensor.data_location = name, kind, TensorProto.EXTERNAL
            tensor.dims.extend(values.shape)
            for key, value in (("location", SHARED), ("offset", offset), ("length", length)):
                entry = tensor.external_data.add()
                entry.key, entry.value = key, str(value)
        nodes = [*casts, *model.graph.node]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        shrunk: bytes = model.SerializeToString()
        return shrunk

    def _place(self, data: bytes) -> tuple[int, int]:
        if data not in self._places:
            self.content += bytes(-len(self.content) % 64)
            self._places[data] = len(self.content), len(data)
            self.content += data
        return self._places[data]


class Point(NamedTuple):
    """A model in the page."""

    name: str
    content: bytes
    description: dict[str, Any]


def write_page(
    file: Path, runtime: Path, model: nn.Module, name: str, points: Sequence[tuple[str, float]] = POINTS
) -> Path:
    """Write the page.

    Args:
        file: the HTML file.
        runtime: the folder of the npm package onnxruntime-web.
        model: a classifier of this library.
        name: of the model.
        points: (policy, ratio) of the reduced models.

    Raises:
        UserError: the runtime is not there, a package is missing, or a policy cannot be exported.
    """
    check_output(file)
    check_request("onnx")
    dist = runtime / "dist"
    for part in RUNTIME:
        if not (dist / part).is_file():
            raise UserError(f"{dist / part} does not exist: npm install onnxruntime-web there, or make demo.")
    weights = Weights()
    models = [point._replace(content=weights.move_out(point.content)) for point in exported(model, name, points)]
    pictures = [picture.read_bytes() for picture in sample_pictures(5)]
    blobs = {
        "runtime": (dist / RUNTIME[0]).read_bytes(),
        "wasm": (dist / RUNTIME[1]).read_bytes(),
        "weights": bytes(weights.content),
        **{f"model{number}": model.content for number, model in enumerate(models)},
        **{f"picture{number}": picture for number, picture in enumerate(pictures)},
    }
    about = [{"name": model.name, **model.description} for model in models]
    labels = about[0]["labels"] or [str(number) for number in range(1000)]
    text = (resources.files("mtr_lab") / "demo" / "page.html").read_text(encoding="utf-8")
    text = text.replace("/*MODELS*/[]", _json(about)).replace("/*LABELS*/[]", _json([readable_name(n) for n in labels]))
    scripts = "\n".join(f'<script type="text/plain" id="{key}">{_packed(blob)}</script>' for key, blob in blobs.items())
    write_output(file, text.replace("<!--DATA-->", scripts).encode())
    return file


def exported(model: nn.Module, name: str, points: Iterable[tuple[str, float]]) -> Iterator[Point]:
    """The unreduced model and the reduced ones, with the plans of their blocks among their outputs."""
    for policy, ratio in [("none", 0.0), *points]:
        title = "unreduced"
        mtr_lab.unpatch(model)
        if ratio:
            mtr_lab.patch(model, policy, ratio=ratio)
            title = f"{policy}, ratio {ratio:g}"
        with tempfile.TemporaryDirectory(prefix="mtr_lab_demo_") as folder:
            written = export_model(model, Path(folder) / "model.onnx", name=name, plans=True)
            yield Point(title, written.file.read_bytes(), written.description.asdict())


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).replace("</", "<\\/")


def _packed(blob: bytes) -> str:
    return base64.b64encode(gzip.compress(blob, 6, mtime=0)).decode()
