"""What an export can be asked for. Checked before PyTorch is imported, which takes seconds, and before any work."""

import os
import shutil
import sys

from mtr_lab.errors import UserError, check_number, unknown
from mtr_lab.packages import require

FORMATS = {"onnx": ".onnx", "pt2": ".pt2", "aotinductor": ".aoti.pt2"}
"""The formats, and the endings of their files."""
PRECISIONS = ("float32", "float16")
OPSETS = range(18, 24)
"""Versions of ONNX's operators."""


def check_request(format: str, precision: str = "float32", batch: int | None = None, opset: int = OPSETS[0]) -> None:
    """Raise a ``UserError`` if no file can be written like this: a mistake, or something is not installed."""
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if batch is not None:
        check_number("batch", batch, int, 1)
    if format == "onnx":
        check_number("opset", opset, int, OPSETS[0], OPSETS[-1])
        for package in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
            require(package, "onnx", "format=onnx")
    if format == "aotinductor":
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler) is None:
            raise UserError(f"format=aotinductor needs a C++ compiler, and {compiler} is not installed: set CXX.")
