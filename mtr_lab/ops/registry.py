"""Operations and their implementations: which one runs is decided here and nowhere else.

An operation lists its implementations in the order in which ``auto`` prefers them. ``Operation.pick`` chooses at every
call, by the selected backend, by device and dtype of the data, and by ``Implementation.unfit``. The registered operator
takes the name of the choice as a string, so that traced and compiled graphs record it.

==========  =====================================================================================
reference   plain PyTorch on any device, in any floating dtype; the tests compare the others with it
portable    plain PyTorch without a loop over tokens: the choice of ``auto`` on devices without kernels
cpu         numba and oneDNN on the CPU: float32; inference of a whole mixer in bfloat16, too
triton      GPUs, float32, float16, bfloat16; kernels compile on first use, no compiler to install
mamba_ssm   the authors' CUDA kernels, if the extra ``cuda`` is installed; ``auto`` prefers ``triton``
==========  =====================================================================================

The backend selects the forward pass. The backward pass runs ``triton`` on a GPU, or ``mamba_ssm`` if that is selected,
``cpu`` for float32 on a CPU, and plain PyTorch elsewhere. Second derivatives are computed in plain PyTorch.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mtr_lab.errors import UserError, unknown
from mtr_lab.packages import installed

BACKENDS = ("auto", "reference", "portable", "cpu", "triton", "mamba_ssm")

_selected = "auto"
_whole: frozenset[str] | None = None  # operators to call while the others are traced into
_decompositions: dict[Any, Callable[..., Any]] = {}


class _Kernels(NamedTuple):
    """The data that the kernels of a backend run."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    text: str


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_KERNELS = {
    "cpu": _Kernels("cpu", (torch.float32,), "float32 on the CPU"),
    "triton": _Kernels("cuda", _FLOATS, "fp32, fp16 or bf16 on a GPU"),
    "mamba_ssm": _Kernels("cuda", _FLOATS, "fp32, fp16 or bf16 on a CUDA device"),
}


# Looked up once: searching the import path is slow compared to an operation, and cannot be traced.
_installed = {package: installed(package) for package in ("triton", "mamba_ssm", "causal_conv1d")}
# Triton's own switch: its kernels then run on the CPU.
_interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")


def set_backend(name: str) -> None:
    """Select the backend of all operations, one of ``BACKENDS``; ``auto`` picks the fastest that can run the data.

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
        raise UserError(
            "ops.backend=triton needs the package triton, which PyTorch installs on Linux only: use ops.backend=auto."
        )
    _selected = name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Select a backend for a ``with`` block."""
    previous = _selected
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


@contextlib.contextmanager
def plain_pytorch(whole: Sequence[str] = ()) -> Iterator[None]:
    """Within the ``with`` block, operations run as plain PyTorch functions, which a tracer follows into their parts.

    This gives the program that ``decompositions`` gives, without a second trace.

    Args:
        whole: names of operators that stay calls of one operator.
    """
    global _whole
    previous, _whole = _whole, frozenset(whole)
    try:
        with use_backend("portable"):
            yield
    finally:
        _whole = previous


def selected_backend() -> str:
    """The selected backend, ``auto`` by default."""
    return _selected


def check_backend(data: Tensor) -> None:
    """Raise a ``UserError`` if the selected backend cannot run data of this dtype on this device."""
    if reason := _mismatch(_selected, data):
        raise _refusal(reason)


def transformed() -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation is active: both need plain PyTorch."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_readable(data: Tensor) -> bool:
    """Whether values of the data can be read without waiting for a device or breaking a graph."""
    return data.device.type == "cpu" and not torch.compiler.is_compiling()


def lacks_gradient(of: str, *inputs: Any) -> str:
    """Why a kernel without a backward pass cannot run these inputs; empty if none of them needs a gradient."""
    differentiable = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    return f"has no gradient of {of}" if differentiable else ""


def autocasts() -> bool:
    """Whether autocast on a GPU chooses dtypes: plain PyTorch follows it, kernels keep the dtype of their data."""
    return torch.is_autocast_enabled("cuda")


@dataclass(frozen=True)
class Implementation:
    """One implementation of an operation.

    Args:
        name: its backend.
        run: takes the operation's inputs and returns its result.
        unfit: takes the inputs and returns why it cannot run them, device and dtype aside; empty if it can.
        package: a package that it needs; plain PyTorch replaces it if the package is not installed.
        composed: whether it runs in place of the registered operator, so that autograd records its operations.
        more: dtypes that it runs besides those of its backend.
    """

    name: str
    run: Callable[..., Any]
    unfit: Callable[..., str] = lambda *inputs, **options: ""
    package: str | None = None
    composed: bool = False
    more: tuple[torch.dtype, ...] = ()

    @property
    def is_installed(self) -> bool:
        return self.package is None or _installed[self.package]


class Operation:
    """An operation and its implementations; call it with its inputs.

    A fused operation combines several others and has no operator. Its fused implementation calls an operator of the
    kernels; its plain one calls the combined operations, for each of which an implementation is picked.

    Args:
        name: of the operator, ``mtr_lab::name``.
        implementations: in the order in which ``auto`` prefers them. The last is functional plain PyTorch without a
            loop over tokens: it runs on every device, under ``torch.func`` and in exported graphs.
        schema: the operator's arguments and result, as ``("Tensor x", "Tensor")``; ``None`` for a fused operation.
        fake: takes the inputs and returns empty tensors of the result's shapes and dtypes.
        main: the index of the input whose device and dtype decide.
        strict: whether inputs that the selected backend cannot run are an error; if not, plain PyTorch runs them.
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
        self._name = name
        self._named = {implementation.name: implementation for implementation in implementations}
        self._main, self._strict, self._fused = main, strict, schema is None
        self._candidates: dict[tuple[str, torch.dtype], tuple[Implementation, ...]] = {}
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
        if transformed() or (_whole is not None and not self._fused and self._name not in _whole):
            return self.portable.run(*inputs, **options)
        chosen = self._pick(inputs, options)
        if self._fused or chosen.composed:
            return chosen.run(*inputs, **options)
        return self.operator(*inputs, chosen.name)

    def pick(self, *inputs: Any, **options: Any) -> Implementation:
        """The implementation that runs these inputs.

        Raises:
            UserError: the selected backend cannot run them.
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
        reason = _mismatch(_selected, data, chosen.more)
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
        """Plain PyTorch: the reference where ``auto`` may pick it, else the portable implementation."""
        reference = self._named.get("reference")
        fits = reference is not None and _may_prefer("reference", data.device.type, data.dtype)
        return reference if reference is not None and fits else self.portable

    def _preferred(self, device: str, dtype: torch.dtype) -> tuple[Implementation, ...]:
        """The implementations that ``auto`` may pick for data of this dtype on this device, cached."""
        candidates = self._candidates.get((device, dtype))
        if candidates is None:
            candidates = tuple(one for one in self.implementations if _may_prefer(one.name, device, dtype, one.more))
            self._candidates[device, dtype] = candidates
        return candidates


def _may_prefer(backend: str, device: str, dtype: torch.dtype, more: tuple[torch.dtype, ...] = ()) -> bool:
    """Whether ``auto`` may pick a backend for data of this dtype on this device."""
    kernels = _KERNELS.get(backend)
    if kernels is None:  # the reference loops over tokens, which is too slow on other devices
        return backend == "portable" or device in ("cpu", "cuda")
    return device == kernels.device and dtype in kernels.dtypes + more


def _mismatch(backend: str, data: Tensor, more: tuple[torch.dtype, ...] = ()) -> str:
    """Why a backend cannot run data of this dtype on this device; empty if it can."""
    kernels = _KERNELS.get(backend)
    if kernels is None:
        return ""
    device = data.device.type
    if data.dtype in kernels.dtypes + more and (
        device == kernels.device or (backend == "triton" and _interpreted and device == "cpu")
    ):
        return ""
    return f"runs {kernels.text}, got {data.dtype} on {data.device}"


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
        run: computes the result.
        fake: returns empty tensors of the result's shapes and dtypes.
        decomposition: computes the result in functional plain PyTorch; replaces the operator in exported graphs.
    """
    registered = torch.library.custom_op(f"mtr_lab::{name}", run, mutates_args=(), schema=schema)
    registered.register_fake(fake)
    _decompositions[getattr(torch.ops.mtr_lab, name).default] = decomposition
    return _Operator(registered, run)


class _Operator:
    """A registered operator. Where nothing can observe the call, its CPU kernels run without PyTorch's dispatcher.

    For one image on a CPU, the dispatcher takes as long as the kernel of a norm.
    """

    def __init__(self, registered: Any, run: Callable[..., Any]) -> None:
        self._registered, self._run = registered, run
        self.register_autograd = registered.register_autograd

    def __call__(self, *inputs: Any) -> Any:
        """Inputs as of the operator; the last is the name of the implementation."""
        if inputs[-1] == "cpu" and _unobserved(inputs):
            return self._run(*inputs)
        return self._registered(*inputs)


def _unobserved(inputs: tuple[Any, ...]) -> bool:
    """Whether no gradient, trace, mode, profiler or subclass of tensors needs to know which operator runs."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
        or any(isinstance(t, Tensor) and type(t) not in (Tensor, torch.nn.Parameter) for t in inputs)
    )


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The decomposition of every operator into plain PyTorch, for programs that run without this library.

    ``torch.export.export(model, (images,)).run_decompositions(ops.decompositions())``
    """
    return dict(_decompositions)
