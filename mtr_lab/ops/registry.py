"""The one place that picks which implementation of an operation runs.

An operation lists its implementations in the order in which ``auto`` prefers them. ``Operation.pick`` chooses once a
call, by the selected backend, the device and dtype of the data, and what an implementation says of the inputs. The name
of the choice is passed to the registered operator as a string, so that a traced or compiled graph records it.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mtr_lab.errors import UserError, unknown

BACKENDS = ("auto", "reference", "portable", "cpu", "triton", "mamba_ssm")

_selected = "auto"
_decompositions: dict[Any, Callable[..., Any]] = {}


class _Kernels(NamedTuple):
    """What the kernels of a backend run at all."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    in_words: str


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_KERNELS = {
    "cpu": _Kernels("cpu", (torch.float32,), "float32 on the CPU"),
    "triton": _Kernels("cuda", _FLOATS, "fp32, fp16 or bf16 on a GPU"),
    "mamba_ssm": _Kernels("cuda", _FLOATS, "fp32, fp16 or bf16 on a CUDA device"),
}


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


def check_backend(data: Tensor) -> None:
    """Raise a ``UserError`` if the selected backend cannot run data of this dtype on this device."""
    if reason := _mismatch(_selected, data):
        raise _refusal(reason)


def transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is at work, which see through plain PyTorch alone."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_readable(data: Tensor) -> bool:
    """Whether a look at the values of the data waits for no device and breaks no graph."""
    return data.device.type == "cpu" and not torch.compiler.is_compiling()


@dataclass(frozen=True)
class Implementation:
    """One implementation of an operation.

    Args:
        name: the backend it belongs to.
        run: takes the operation's inputs and returns its result.
        unfit: takes the inputs and says why it cannot run them, beyond their device and dtype; empty if it can.
        package: what it imports; where that is not installed, plain PyTorch takes its place.
        composed: whether it is called in place of the registered operator, so that autograd sees what it does.
    """

    name: str
    run: Callable[..., Any]
    unfit: Callable[..., str] = lambda *inputs, **options: ""
    package: str | None = None
    composed: bool = False

    @property
    def is_installed(self) -> bool:
        return self.package is None or _installed[self.package]


class Operation:
    """An operation and its implementations; call it with its inputs.

    A fused operation does the work of several others. It has no operator: its kernels have one each, and where none
    fits, the others run one by one, each by its own choice.

    Args:
        name: of the operator, ``mtr_lab::name``.
        implementations: in the order in which ``auto`` prefers them. The last is functional plain PyTorch without a
            loop over tokens: it runs everywhere, ``torch.func`` sees through it, an exported graph decomposes to it.
        schema: the operator's arguments and result, as ``("Tensor x", "Tensor")``; ``None`` for a fused operation.
        fake: returns empty tensors of the result's shapes and dtypes, from the same inputs.
        main: the index of the input whose device and dtype decide.
        strict: whether it is an error if the selected backend cannot run the inputs; else plain PyTorch runs them.
    """

    def __init__(
        self,
        name: str,
        implementations: Sequence[Implementation],
        *,
        schema: tuple[str, str] | None = None,
        fake: Callable[..., Any] | None = None,
        main: int = 0,
        strict: bool = True,
    ) -> None:
        self.implementations = tuple(implementations)
        self.portable = self.implementations[-1]
        self._named = {implementation.name: implementation for implementation in implementations}
        self._main, self._strict, self._fused = main, strict, schema is None
        self._kept: dict[tuple[str, torch.dtype], tuple[Implementation, ...]] = {}
        if schema is not None and fake is not None:
            arguments, result = schema
            self.operator = operator(
                name,
                f"({arguments}, str implementation) -> {result}",
                run=lambda *inputs: self._named[inputs[-1]].run(*inputs[:-1]),
                fake=lambda *inputs: fake(*inputs[:-1]),
                decomposition=lambda *inputs: self.portable.run(*inputs[:-1]),
            )

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        if transformed():
            return self.portable.run(*inputs, **options)
        chosen = self._pick(inputs, options)
        if self._fused or chosen.composed:
            return chosen.run(*inputs, **options)
        return self.operator(*inputs, chosen.name)

    def pick(self, *inputs: Any, **options: Any) -> Implementation:
        """The implementation that runs these inputs.

        Raises:
            UserError: a backend was selected explicitly and cannot run them.
        """
        return self.portable if transformed() else self._pick(inputs, options)

    def _pick(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> Implementation:
        data = inputs[self._main]
        if _selected == "auto":
            for implementation in self._preferred(data.device.type, data.dtype):
                if implementation.is_installed and not implementation.unfit(*inputs, **options):
                    return implementation
            return self.portable
        chosen = self._named.get(_selected)
        if chosen is None:
            return self._plain(data)
        reason = _mismatch(_selected, data)
        if not reason and chosen.is_installed:
            reason = chosen.unfit(*inputs, **options)
            if not reason:
                return chosen
            if self._fused:
                return self._plain(data)
        if reason and self._strict:
            raise _refusal(reason)
        return self._plain(data)

    def _plain(self, data: Tensor) -> Implementation:
        """Plain PyTorch: the reference where ``auto`` may take it."""
        reference = self._named.get("reference")
        fits = reference is not None and _may_prefer("reference", data.device.type, data.dtype)
        return reference if reference is not None and fits else self.portable

    def _preferred(self, device: str, dtype: torch.dtype) -> tuple[Implementation, ...]:
        """The implementations that ``auto`` may take for such data; looked up at every call, so kept."""
        kept = self._kept.get((device, dtype))
        if kept is None:
            kept = tuple(one for one in self.implementations if _may_prefer(one.name, device, dtype))
            self._kept[device, dtype] = kept
        return kept


def _may_prefer(backend: str, device: str, dtype: torch.dtype) -> bool:
    """Whether ``auto`` may take a backend for data of this dtype on this device."""
    kernels = _KERNELS.get(backend)
    if kernels is None:  # on other devices each token of a loop costs launches
        return backend == "portable" or device in ("cpu", "cuda")
    return device == kernels.device and dtype in kernels.dtypes


def _mismatch(backend: str, data: Tensor) -> str:
    """Why a backend cannot run data of this dtype on this device; empty if it can."""
    kernels = _KERNELS.get(backend)
    if kernels is None:
        return ""
    here = data.device.type
    if data.dtype in kernels.dtypes and (
        here == kernels.device or (backend == "triton" and _interpreted and here == "cpu")
    ):
        return ""
    return f"runs {kernels.in_words}, got {data.dtype} on {data.device}"


def _refusal(reason: str) -> UserError:
    return UserError(f"ops.backend={_selected} {reason}: use auto or reference.")


def operator(
    name: str,
    schema: str,
    *,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    decomposition: Callable[..., Any],
) -> Any:
    """Register the operator ``mtr_lab::name``.

    Args:
        schema: its arguments and result.
        run: computes it.
        fake: returns empty tensors of the result's shapes and dtypes.
        decomposition: computes it in functional plain PyTorch, which takes its place in an exported graph.
    """
    registered = torch.library.custom_op(f"mtr_lab::{name}", run, mutates_args=(), schema=schema)
    registered.register_fake(fake)
    _decompositions[getattr(torch.ops.mtr_lab, name).default] = decomposition
    return registered


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Every operator of the library and its functional plain PyTorch, for programs that run without the library.

    ``torch.export.export(model, (images,)).run_decompositions(ops.decompositions())``
    """
    return dict(_decompositions)
