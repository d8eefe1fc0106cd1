"""Peak memory of a call, with the same definition on the CPU and on a GPU."""

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler import profile

MIB = 2**20


def peak_memory_mib(run: Callable[[], object], resident: Iterable[Tensor], device: str | torch.device) -> float:
    """The peak of the memory of ``resident`` plus the allocations of ``run``.

    Counted is memory from PyTorch's allocator: outputs, intermediate results and scratch tensors inside operators,
    custom ones included. Not counted are other tensors allocated before the call, memory that is reserved and unused,
    and buffers that do not come from PyTorch. The allocator of a GPU rounds tensors up to 512 bytes. Call ``run`` once
    before, since the first call allocates memory that later calls reuse.

    Args:
        run: the call; its result is discarded after the measurement.
        resident: tensors to count that exist before the call, usually parameters, buffers and inputs. Views of one
            storage count once; tensors on other devices do not count.
        device: the device of ``run``, "cpu" or a CUDA device.

    Returns:
        MiB (2²⁰ bytes).
    """
    device = torch.device(device)
    storages = [tensor.untyped_storage() for tensor in resident if tensor.device.type == device.type]
    resident_bytes = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    allocated = _peak_on_gpu(run, device) if device.type == "cuda" else _peak_on_cpu(run)
    return (resident_bytes + allocated) / MIB


def _peak_on_gpu(run: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(run: Callable[[], object]) -> int:
    # Set before the profiler's first use, this keeps its progress lines out of stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(profile_memory=True) as recorded:
        result = run()
    del result  # freed after the recording, as on a GPU
    events = recorded.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]" and event.device_type() == DeviceType.CPU]
    allocated = peak = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak
