"""Peak memory of a call, defined alike on the CPU and on a GPU."""

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler import profile

MIB = 2**20


def peak_memory_mib(run: Callable[[], object], resident: Iterable[Tensor], device: str | torch.device) -> float:
    """The most memory that ``resident`` and what ``run`` allocates hold at one time.

    Both devices count what PyTorch's allocator hands out: outputs, intermediate results and the scratch tensors inside
    operators, custom ones included. Both leave out whatever else was alive before the call (other models, cached
    workspaces), memory reserved and unused, and buffers that do not come from PyTorch. A GPU's allocator rounds every
    tensor up to 512 bytes. Call ``run`` once before, since a first call allocates what later ones reuse.

    Args:
        run: the call; its result is discarded after the measurement.
        resident: tensors alive during the call that the figure should contain, normally the parameters, the buffers
            and the inputs. Views of one storage count once, and tensors on another device not at all.
        device: where ``run`` computes, "cpu" or a CUDA device.

    Returns:
        MiB (2²⁰ bytes).
    """
    device = torch.device(device)
    storages = [tensor.untyped_storage() for tensor in resident if tensor.device.type == device.type]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    allocated = _peak_on_gpu(run, device) if device.type == "cuda" else _peak_on_cpu(run)
    return (held + allocated) / MIB


def _peak_on_gpu(run: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(run: Callable[[], object]) -> int:
    # The profiler writes progress lines to stderr unless told not to before its first use.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(profile_memory=True) as recorded:
        result = run()
    del result  # alive until here, as on a GPU, so that its release is not part of the record
    events = recorded.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]" and event.device_type() == DeviceType.CPU]
    held = peak = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
