"""The gradients of the selective scan, as an operator with gradients again.

For shapes see ``ScanInputs``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from mtr_lab.ops.registry import Implementation, Operation
from mtr_lab.ops.scan_inputs import SCHEMA, ScanInputs, flat
from mtr_lab.ops.scan_mamba_ssm import has_no_gradient, selective_scan_backward_mamba_ssm
from mtr_lab.ops.scan_reference import selective_scan_backward_reference
from mtr_lab.ops.vjp import vjp


def selective_scan_backward_triton(inputs: ScanInputs, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Kernels in ``mtr_lab.ops.gpu``, deterministic. Arguments and result as ``selective_scan_backward_reference``."""
    from mtr_lab.ops.gpu import scan_backward

    return scan_backward.selective_scan_backward(inputs, grad)


def _selective_scan_backward_cpu(inputs: ScanInputs, grad: Tensor) -> tuple[Tensor | None, ...]:
    from mtr_lab.ops.cpu import scan_gradient

    return scan_gradient.selective_scan_backward(inputs, grad)


def _filled(backward: Callable[[ScanInputs, Tensor], Sequence[Tensor | None]]) -> Callable[..., Any]:
    """Like ``flat``, and returns contiguous gradients. An operator returns tensors: empty ones for absent inputs."""

    def call(inputs: ScanInputs, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(inputs.u.new_empty(0) if t is None else t.contiguous() for t in backward(inputs, grad))

    return flat(call)


def _repeats(inputs: ScanInputs, grad: Tensor) -> str:
    return "" if inputs.repeats is None else "has no gradient of a scan with repeats"


def _like_inputs(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(arguments[0].new_empty(0) if t is None else t.new_empty(t.shape) for t in arguments[:8])


SELECTIVE_SCAN_BACKWARD = Operation(
    "selective_scan_backward",
    [
        Implementation("triton", _filled(selective_scan_backward_triton), unfit=flat(_repeats), package="triton"),
        Implementation("cpu", _filled(_selective_scan_backward_cpu), unfit=flat(_repeats)),
        Implementation(
            "mamba_ssm",
            flat(selective_scan_backward_mamba_ssm),
            unfit=flat(has_no_gradient),
            package="mamba_ssm",
            composed=True,
        ),
        Implementation("reference", _filled(selective_scan_backward_reference)),
        Implementation("portable", _filled(partial(selective_scan_backward_reference, loop=False))),
    ],
    schema=(f"{SCHEMA}, Tensor grad", f"({', '.join(['Tensor'] * 8)})"),
    fake=_like_inputs,
    strict=False,
)


def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save what ``backward`` reads; see ``torch.library.register_autograd``."""
    *tensors, ctx.reverse, _, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])


def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the flat arguments of ``selective_scan``, given that of y, (B, L, E)."""
    tensors = ctx.saved_tensors
    grads = SELECTIVE_SCAN_BACKWARD(*tensors, ctx.reverse, grad)
    return *(None if t is None else g for t, g in zip(tensors[:8], grads, strict=True)), *(None,) * 7


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.reverse, grad, _ = inputs
    ctx.save_for_backward(*tensors, grad)


def _second_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, grad = ctx.saved_tensors
    inputs = ScanInputs._make((*tensors, ctx.reverse))

    def first_gradients(*tensors: Any) -> tuple[Tensor, ...]:
        *differentiable, grad = tensors
        first = selective_scan_backward_reference(ScanInputs._make((*differentiable, *inputs[8:])), grad, loop=False)
        return tuple(t for t in first if t is not None)

    present = [g for t, g in zip(inputs[:8], grads, strict=True) if t is not None]
    *second, of_grad = vjp(first_gradients, [*inputs[:8], grad], present)
    return *second, *(None,) * 5, of_grad, None


SELECTIVE_SCAN_BACKWARD.operator.register_autograd(_second_backward, setup_context=_setup_second)
