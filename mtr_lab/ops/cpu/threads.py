"""Call a kernel on as many threads as PyTorch uses."""

import threading
from collections.abc import Callable
from typing import Any

import numba
import torch

# OpenMP supports callers in several threads, and wakes faster than numba's own pool beside PyTorch's OpenMP threads.
# It must not run in a process that was forked after its first use; data loading workers run no kernel.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # type: ignore[attr-defined]
# The last choice, workqueue, does not support concurrent callers.
_one_at_a_time = threading.Lock()


def run(kernel: Callable[..., None], *args: Any, share: int | None = None) -> None:
    """Call a kernel on as many threads as PyTorch uses, at most ``share``: those with enough to do."""
    threads = torch.get_num_threads()
    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    with _one_at_a_time:
        before, wanted = numba.get_num_threads(), min(threads, most, share or most)
        if torch.get_num_threads() != threads:
            # Numba resets the thread count of the shared OpenMP runtime on first use.
            torch.set_num_threads(threads)
        if before == wanted:
            kernel(*args)
            return
        numba.set_num_threads(wanted)
        try:
            kernel(*args)
        finally:
            numba.set_num_threads(before)


def share_of(elements: int) -> int:
    """How many threads have enough to do for a norm or a convolution: waking one takes as long as 2^16 elements."""
    return max(1, elements // 2**16)
