"""Launch configuration of the kernels: device, tuning, memory layout, precision and registers."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtr_lab.errors import UserError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

INTERPRETED = triton.knobs.runtime.interpret
MOST_PROGRAMS = 65_535  # on the second and the third axis of a grid, by CUDA
STAGES = tl.constexpr(3)  # pipeline stages of the loops over tokens


def on_its_device(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run the function with the device of its first argument as the current one, where Triton launches kernels.

    The argument is a tensor, or a tuple whose first entry is one.
    """

    @wraps(function)
    def run(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        first: Any = args[0] if args else next(iter(options.values()))
        tensor = first[0] if isinstance(first, tuple) else first
        if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
            return function(*args, **options)
        with torch.cuda.device_of(tensor):
            return function(*args, **options)

    return run


def check_launch(sequences: int) -> None:
    """Raise a ``UserError`` if there are too many sequences for kernels that have them on the second or third axis."""
    if sequences > MOST_PROGRAMS:
        raise UserError(
            f"{sequences} sequences in one batch: a kernel on a GPU takes at most {MOST_PROGRAMS}. Use smaller batches."
        )


def autotuned(configs: list[triton.Config], key: list[str]) -> Callable[[Any], Any]:
    """Time the configurations once for each key and dtype, and cache the choice on disk beside the compiled kernels.

    Under Triton's interpreter the first configuration is taken.
    """
    return triton.autotune(configs[:1] if INTERPRETED else configs, key=key, cache_results=True)


def rows(x: Tensor) -> Tensor:
    """x (B, L, E) itself if all rows are contiguous and evenly spaced, else a contiguous copy."""
    return x if x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()


def reverse_mask(reverse: Any) -> int:
    """An integer whose bit g is set if direction g reads from the last token to the first."""
    return sum(1 << g for g, back in enumerate(reverse) if back)


def num_sms(device: torch.device) -> int:
    """The number of multiprocessors of a GPU; 1 for the CPU of the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def resident_warps(device: torch.device) -> int:
    """The number of one-warp programs, of 168 registers a thread, that a device runs at once: 12 a multiprocessor."""
    return 12 * num_sms(device)


def precision(dtype: torch.dtype) -> str:
    """The mode of ``product`` for data of this dtype."""
    if dtype == torch.float32:
        return "ieee"
    # The interpreter has no product of bfloat16: it would multiply the bits as integers.
    return "widened" if INTERPRETED and dtype == torch.bfloat16 else "native"


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, accumulated in float32."""
    if PRECISION == "native":
        return tl.dot(a, b, total)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")


def registers(limit: int) -> dict[str, int]:
    """The launch option that limits the registers of a thread, for NVIDIA's compiler alone."""
    return {"maxnreg": limit} if torch.version.hip is None else {}


@triton.jit
def unstack(x, U: tl.constexpr):
    """(U, K) -> U times (K,), U a power of two."""
    if U == 1:
        return (tl.reshape(x, (x.shape[1],)),)
    else:
        first, second = tl.split(tl.permute(tl.reshape(x, (2, U // 2, x.shape[1])), (1, 2, 0)))
        return unstack(first, U // 2) + unstack(second, U // 2)


@triton.jit
def stack(xs, U: tl.constexpr):
    """U times (K,) -> (U, K), U a power of two: without an exchange between threads if each has whole columns."""
    if U == 1:
        return tl.reshape(xs[0], (1, xs[0].shape[0]))
    else:
        joined = tl.join(stack(xs[: U // 2], U // 2), stack(xs[U // 2 :], U // 2))
        return tl.reshape(tl.permute(joined, (2, 0, 1)), (U, xs[0].shape[0]))
