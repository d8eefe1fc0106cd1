"""The one place that decides which implementation of an operation runs.

Every operation keeps its implementations in a table keyed by backend name. The choice is made once per call, from the
device and dtype of the data, and passed to the registered operator as a plain string, so that a traced or compiled
graph records which one it used.

==========  =====================================================================================
reference   plain PyTorch: any device, any floating dtype, what the others are tested against
portable    plain PyTorch without a loop over tokens: what ``auto`` takes on devices that have no kernel here
cpu         numba, float32 on the CPU
triton      GPUs, float32, float16, bfloat16; kernels compiled on first use, no compiler to install
mamba_ssm   the authors' CUDA kernels, when the extra ``cuda`` is installed; ``auto`` prefers ``triton``
==========  =====================================================================================

A backend chooses the forward pass. The backward pass runs the implementation for that device that has gradients:
``triton`` on a GPU, ``mamba_ssm`` there if it was selected, else plain PyTorch (``reference`` on a CPU, ``portable``
on other devices). A backward pass that is recorded to be differentiated again is differentiated in plain PyTorch.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch
from torch.autograd import forward_ad

from mtr_lab.errors import UserError, unknown

BACKENDS = ("auto", "reference", "portable", "cpu", "triton", "mamba_ssm")

_selected = "auto"


def installed(package: str) -> bool:
    """Whether a package can be imported; a stand-in for it in ``sys.modules`` without a spec does not count."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # its __spec__ is None
        return False


# Looked up once: the search of the import path is slow beside an operation, and cannot be traced.
_installed = {package: installed(package) for package in ("triton", "mamba_ssm", "causal_conv1d")}
# Triton's own switch: its kernels then run on the CPU.
_interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")


def set_backend(name: str) -> None:
    """Select the implementation of all operations: one of ``BACKENDS``; ``auto`` picks the fastest known to fit.

    Raises:
        UserError: the name is unknown, or the package it needs is not installed.
    """
    global _selected
    if name not in BACKENDS:
        raise unknown("ops.backend", name, BACKENDS)
    if name == "mamba_ssm" and not _installed["mamba_ssm"]:
        raise UserError(
            "ops.backend=mamba_ssm needs the packages mamba-ssm and causal-conv1d, which are not installed: "
            "install the extra `cuda` (an NVIDIA GPU and a CUDA compiler), or use ops.backend=auto."
        )
    if name == "triton" and not _installed["triton"]:
        raise UserError("ops.backend=triton needs the package triton, which PyTorch brings along on Linux: use auto.")
    _selected = name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Select an implementation inside a ``with`` block."""
    previous = _selected
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


def selected_backend() -> str:
    """The backend selected at present, ``auto`` unless changed."""
    return _selected


def pick(data: torch.Tensor, *, package: str | None = None, gap: bool = False) -> str:
    """Name the implementation for ``data``.

    Args:
        data: the operation's main input; its device and dtype decide.
        package: the CUDA package the ``mamba_ssm`` implementation of this operation comes from; ``None`` for an
            operation that has but a ``reference`` and a ``triton`` implementation.
        gap: whether the state has to decay over removed tokens, which the CUDA kernels cannot do.

    Raises:
        UserError: a backend was selected explicitly and cannot run this input.
    """
    if _runs_triton(data):
        return "triton"
    if _selected == "triton":
        raise UserError(
            f"ops.backend=triton runs fp32, fp16 or bf16 on a GPU, got {data.dtype} on {data.device}: "
            "use auto or reference."
        )
    if package is None:
        return "reference"
    on_cpu = data.device.type == "cpu" and data.dtype == torch.float32
    on_cuda = data.device.type == "cuda" and data.dtype != torch.float64 and _installed[package] and not gap
    if _selected == "auto":
        return "cpu" if on_cpu else "mamba_ssm" if on_cuda else _plain(data)
    if _selected == "cpu" and not on_cpu:
        raise UserError(
            f"ops.backend=cpu runs float32 on the CPU, got {data.dtype} on {data.device}: use auto or reference."
        )
    if _selected == "mamba_ssm" and not on_cuda:
        if gap:
            raise UserError("ops.backend=mamba_ssm cannot decay the state over removed tokens: use auto or reference.")
        if data.device.type != "cuda" or data.dtype == torch.float64:
            raise UserError(
                f"ops.backend=mamba_ssm runs fp32, fp16 or bf16 on a CUDA device, got {data.dtype} on {data.device}: "
                "use auto or reference."
            )
        return "reference"  # causal-conv1d alone is missing: mamba-ssm works without it
    return _selected


def pick_differentiable(data: torch.Tensor, *, package: str, gap: bool = False) -> str:
    """Name the implementation the backward pass runs or recomputes with."""
    if _runs_triton(data):
        return "triton"
    fits = data.device.type == "cuda" and data.dtype != torch.float64 and not gap
    if fits and _selected not in ("reference", "portable") and _installed[package]:
        return "mamba_ssm"
    return "reference" if _selected == "reference" else _plain(data)


def transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is at work, which see through plain PyTorch alone."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _plain(data: torch.Tensor) -> str:
    """``reference`` on a CPU or a CUDA device, ``portable`` elsewhere, where each token of a loop costs launches."""
    known = data.device.type in ("cpu", "cuda")
    return "reference" if known and _selected != "portable" else "portable"


def _runs_triton(data: torch.Tensor) -> bool:
    """Whether Triton's kernels are selected, or the best there are, and fit the data."""
    if data.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    if _selected == "auto":
        return data.device.type == "cuda" and _installed["triton"]
    return _selected == "triton" and (data.device.type == "cuda" or (_interpreted and data.device.type == "cpu"))
