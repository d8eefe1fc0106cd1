"""Compile a kernel on its first call, and cache it on disk."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba


@functools.cache
def _version() -> str:
    """A hash of the files of this package: numba compares the file of a kernel with its cache, not those it imports."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` with a cache. The name of a kernel contains its version, and so does that of its cached file."""
    # nsz and contract allow max and fused multiply-add instructions, and do not affect infinities, NaN or order.
    options = {"error_model": "numpy", "fastmath": {"nsz", "contract"}} | options

    def compile_lazily(function: Callable[..., Any]) -> Any:
        function.__qualname__ += f"_{_version()}"
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no cache directory is writable
            return numba.njit(**options)(function)

    return compile_lazily
