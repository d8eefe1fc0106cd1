"""The kernels run on a GPU if the machine has one, else under Triton's interpreter."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True, scope="session")
def _interpreted_language() -> None:
    """Patch Triton's language once. The interpreter patches it at every call of a device function: half of its time."""
    if not torch.cuda.is_available():
        interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)


@pytest.fixture(autouse=True, scope="session")
def _remembered_types() -> None:
    """Make every type once. The interpreter makes types and a table of them at every operation: a fifth of its time."""
    if torch.cuda.is_available():
        return
    blocks: dict[tuple, dict[str, Any]] = {}
    numpy_types: dict[str, Any] = {}
    make_block, numpy_type = tl.core.block_type.__init__, interpreter._get_np_dtype

    def block(self: tl.core.block_type, element_ty: tl.core.dtype, shape: Any) -> None:
        key = element_ty.name, *map(int, shape)
        if key in blocks:
            vars(self).update(blocks[key])
        else:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))

    def remembered(dtype: tl.core.dtype) -> Any:
        if dtype.name not in numpy_types:
            numpy_types[dtype.name] = numpy_type(dtype)
        return numpy_types[dtype.name]

    tl.core.block_type.__init__, interpreter._get_np_dtype = block, remembered


@pytest.fixture(autouse=True, scope="session")
def _first_configuration() -> None:
    """Do not tune: timing all configurations for every small shape would take minutes."""
    from mtr_lab.ops.gpu import project

    for kernel in (project._convolve, project._timescales):
        kernel.configs = kernel.configs[:1]


@pytest.fixture(autouse=True)
def _one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scan sequences whole under the interpreter, which runs programs one after the other: this form has the fewest."""
    from mtr_lab.ops.gpu import scan

    if not torch.cuda.is_available():
        monkeypatch.setattr(scan, "half_width", lambda *_: None)
        monkeypatch.setattr(scan, "fits_together", lambda *_: False)


@pytest.fixture
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | int:
    """The form of the scan: "whole", "chunks", "together", or halves, given by the channels of a program."""
    from mtr_lab.ops.gpu import scan, scan_chunks

    monkeypatch.setattr(scan, "fits_together", lambda *_: request.param == "together")
    monkeypatch.setattr(scan, "half_width", lambda *_: request.param if isinstance(request.param, int) else None)
    monkeypatch.setattr(scan_chunks, "resident_warps", lambda device: 100 if request.param == "chunks" else 0)
    monkeypatch.setattr(scan_chunks, "MIN_CHUNK", 4)
    return request.param


@pytest.fixture
def device() -> torch.device:
    """That of the kernels, for a test that places its tensors there itself."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Other tests create tensors on the device of the kernels."""
    if "device" in request.fixturenames:
        yield
        return
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield
