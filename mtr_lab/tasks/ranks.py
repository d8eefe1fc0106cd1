"""What the processes of an evaluation tell each other, over the hosts' network: rank 0 leads, the others follow."""

from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long the others wait for rank 0, which times models and waits for locks. They learn at once if it is gone."""


def from_rank_zero(value: T) -> T:
    """Rank 0's ``value``, on every rank; anything that can be pickled. The value itself in a single process."""
    if not _several():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_hosts())
    return values[0]


def gather_batches(mine: list[T]) -> list[T]:
    """What all ranks have found out about their batches, in the order of the batches; on rank 0, elsewhere nothing.

    Args:
        mine: of rank r of w, what belongs to batches r, r + w, r + 2w, …; anything that can be pickled.
    """
    if not _several():
        return mine
    world_size, leads = dist.get_world_size(), dist.get_rank() == 0
    counts: list[int] = [0] * world_size
    dist.all_gather_object(counts, len(mine), group=_hosts())
    gathered: list[T] = []
    for i in range(max(counts)):  # not all at once: a run over ImageNet is more than a message can hold
        row: list[T | None] | None = [None] * world_size if leads else None
        dist.gather_object(mine[i] if i < len(mine) else None, row, dst=0, group=_hosts())
        gathered += [batch for batch, count in zip(row or [], counts, strict=leads) if i < count]  # type: ignore[misc]
    return gathered


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@cache
def _hosts() -> Any:
    """Gloo beside NCCL: what is gathered is in the hosts' memory, and gloo notices a process that has died."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)
