"""What the kernels share: how a configuration is chosen, and what layouts they accept."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

INTERPRETED = triton.knobs.runtime.interpret
STAGES = tl.constexpr(3)  # groups of tokens that a walk has under way or at work


def on_its_device(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, run on the device of its first argument: kernels are launched on the current device.

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


def autotuned(configs: list[triton.Config], key: list[str]) -> Callable[[Any], Any]:
    """Time the configurations once for each key and dtype, and keep the choice on disk beside the compiled kernels.

    Triton's interpreter, which cannot time, takes the first.
    """
    return triton.autotune(configs[:1] if INTERPRETED else configs, key=key, cache_results=True)


def rows(x: Tensor) -> Tensor:
    """(B, L, E) as it is if its rows are evenly spaced and contiguous each, else a contiguous copy."""
    return x if x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()


def reverse_mask(reverse: Any) -> int:
    """Bit g is set if direction g reads from the last token to the first."""
    return sum(1 << g for g, back in enumerate(reverse) if back)


def num_sms(device: torch.device) -> int:
    """The multiprocessors of a GPU; 1 of any other device, where the interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def resident_warps(device: torch.device) -> int:
    """How many one-warp programs of many registers a device runs at once: twelve a multiprocessor."""
    return 12 * num_sms(device)


def precision(dtype: torch.dtype) -> str:
    """How ``product`` multiplies data of this dtype."""
    if dtype == torch.float32:
        return "ieee"
    # The interpreter would multiply the bit patterns of bfloat16 as integers.
    return "widened" if INTERPRETED and dtype == torch.bfloat16 else "native"


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, accumulated in float32."""
    if PRECISION == "native":
        return tl.dot(a, b, total)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")


def registers(limit: int) -> dict[str, int]:
    """The option that limits the registers of a thread, which NVIDIA's compiler has."""
    return {"maxnreg": limit} if torch.version.hip is None else {}


@triton.jit
def unstack(x, U: tl.constexpr):
    """(U, K) -> U times (K,), U a power of two."""
    if U == 1:
        return (tl.reshape(x, (x.shape[1],)),)
    else:
        first, second = tl.split(tl.permute(tl.reshape(x, (2, U // 2, x.shape[1])), (1, 2, 0)))
        return unstack(first, U // 2) + unstack(second, U // 2)
