"""Exported files against their model, and their speed: ``python experiments/parity_exports.py OUT.json``.

The bundled model is exported at three ratios. ONNX Runtime and OpenVINO classify the bundled pictures: once compared
with the model that follows the file's plans, once with the model as it decides itself. So does ONNX Runtime with a
float16 file. Times are CPU seconds of one
thread, the least of several calls in turn; the bound is the time of the model's matrix products alone in PyTorch.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mtr_lab
from mtr_lab.data.pictures import prepare, sample_pictures
from mtr_lab.export.deployable import forced_plans, recorded_plans
from mtr_lab.export.model import export_model
from mtr_lab.export.onnx_file import OnnxFile
from mtr_lab.export.torch_file import TorchFile

RATIOS = (0.0, 0.3, 0.4)
PICTURES = 200
BATCH = 8
CALLS = 5
HALF = 0.3
"""The ratio of the float16 file, and of the files for PyTorch."""
COMPILED = "compiled"


def bundled(ratio: float) -> Any:
    """The bundled model, reduced by MTR."""
    model = mtr_lab.create_model("vim_nano", pretrained=True).eval()
    if ratio:
        mtr_lab.patch(model, "mtr", ratio=ratio)
    return model


def pictures(data_config: dict[str, Any]) -> Tensor:
    """The bundled pictures as the model sees them."""
    return torch.stack([prepare(picture, data_config) for picture in sample_pictures(PICTURES)])


def runtimes(file: Path) -> dict[str, Callable[[Tensor], list[Tensor]]]:
    """Functions that run the file, by the name of the runtime."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)

    def with_openvino(images: Tensor) -> list[Tensor]:
        result = compiled(images.numpy())
        return [torch.from_numpy(result[output].copy()) for output in compiled.outputs]

    return {"onnxruntime": OnnxFile(file).outputs, "openvino": with_openvino}


@torch.no_grad()
def parity(model: Any, run: Callable[[Tensor], list[Tensor]], batches: Sequence[Tensor]) -> dict[str, float]:
    """Errors relative to the largest output, with the file's plans and with each side's own, and the agreement."""
    forced, free, same = 0.0, 0.0, 0
    for images in batches:
        with recorded_plans(model) as plans:
            own = model(images)
        result, *tensors = run(images)
        expected = own
        if plans:
            with forced_plans(model, tensors, plans):
                expected = model(images)
        scale = max(1.0, float(own.abs().max()))
        forced = max(forced, float((result - expected).abs().max()) / scale)
        free = max(free, float((result - own).abs().max()) / scale)
        same += int((result.argmax(1) == own.argmax(1)).sum())
    return {"forced": forced, "free": free, "agreement": same / sum(map(len, batches))}


class Products(TorchDispatchMode):
    """The matrix products that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket
        if name in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.convolution):
            given = [t.detach() if isinstance(t, Tensor) else t for t in args]
            self.calls.append(lambda: function(*given))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def cpu_milliseconds(functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The least CPU time of a call of each function, called in turn."""
    best = dict.fromkeys(functions, float("inf"))
    for turn in range(CALLS + 2):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if turn > 1:
                best[name] = min(best[name], 1e3 * (time.process_time() - start))
    return {name: round(value, 2) for name, value in best.items()}


def times(model: Any, files: dict[str, Callable[[Tensor], Any]], images: Tensor) -> dict[str, float]:
    """CPU milliseconds of the model, the files and the model's matrix products."""
    products = Products()
    with torch.no_grad(), products, mtr_lab.ops.use_backend("portable"):
        model(images)
    functions: dict[str, Callable[[], Any]] = {"eager": lambda: model(images)}
    functions |= {name: lambda run=run: run(images) for name, run in files.items()}
    functions["products"] = lambda: [call() for call in products.calls]
    return cpu_milliseconds(functions)


def measured(model: Any, ratio: float, folder: Path) -> dict[str, Any]:
    """Parity and speed of the ONNX file; at ``HALF`` of the float16 file, too."""
    start = time.process_time()
    exported = export_model(model, folder / "model.onnx", name="vim_nano", plans=True)
    result: dict[str, Any] = {"nodes": exported.nodes, "export_s": time.process_time() - start, "pictures": PICTURES}
    images = pictures(exported.description.data_config)
    calls: dict[str, Any] = dict(runtimes(folder / "model.onnx"))
    if ratio == HALF:
        half = export_model(model, folder / "half.onnx", precision="float16", name="vim_nano", plans=True)
        result["float16_bytes"] = half.file.stat().st_size
        calls["onnxruntime_float16"] = OnnxFile(half.file).outputs
    for runtime, run in calls.items():
        result[runtime] = parity(model, run, images.split(BATCH))
    result["ms"] = {str(size): times(model, calls, images[:size]) for size in (1, BATCH)}
    return result


def compiled(folder: Path) -> dict[str, Any]:
    """Seconds to write the files for PyTorch, and their speed beside the model's."""
    model, result, calls = bundled(HALF), {}, {}
    for format, ending in (("pt2", "pt2"), ("aotinductor", "aoti.pt2")):
        start = time.process_time()
        exported = export_model(model, folder / f"model.{ending}", format=format, name="vim_nano")
        result[f"{format}_export_s"] = time.process_time() - start
        calls[format] = TorchFile(exported.file)
    images = pictures(exported.description.data_config)
    return {**result, "ms": {str(size): times(model, calls, images[:size]) for size in (1, BATCH)}}


def main() -> None:
    """Measure what OUT.json lacks, print it, and write it."""
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    results = json.loads(out.read_text()) if out.exists() else {}
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        str(ratio): lambda folder, ratio=ratio: measured(bundled(ratio), ratio, folder) for ratio in RATIOS
    }
    for key, part in (parts | {COMPILED: compiled}).items():
        if key in results:
            continue
        with tempfile.TemporaryDirectory() as name:
            results[key] = part(Path(name))
        print(key, json.dumps(results[key]), flush=True)
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
