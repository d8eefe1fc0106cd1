"""What the processes of an evaluation tell each other, over the hosts' network: rank 0 leads, the others follow."""

from collections.abc import Callable
from datetime import timedelta
from functools import cache
from itertools import zip_longest
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar

import torch.distributed as dist

T = TypeVar("T")

TIMEOUT = timedelta(days=1)
"""How long the others wait for rank 0, which times models and waits for locks. They learn at once if it is gone."""


def from_rank_zero(value: T) -> T:
    """Rank 0's ``value``, on every rank; anything that can be pickled. The value itself in a single process."""
    if not _several():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_hosts())
    return values[0]


class Gathering(Generic[T]):
    """Brings what all ranks find out about their batches to rank 0, each while the next ones are at work.

    To be made in every process. Rank r of w finds out about batches r, r + w, r + 2w, …; anything that can be pickled,
    but ``None``.
    """

    def __init__(self) -> None:
        self._group = _hosts() if _several() else None  # made by all ranks at once
        self._rank, ranks = (dist.get_rank(), dist.get_world_size()) if self._group is not None else (0, 1)
        self._outgoing: SimpleQueue[T | None] = SimpleQueue()
        self._incoming: list[list[T]] = [[] for _ in range(1, ranks)]
        self._error: BaseException | None = None
        exchange = self._send if self._rank > 0 else self._receive
        self._thread = Thread(target=self._run, args=[exchange], daemon=True)  # a rank that fails waits for nobody

    def put(self, found: T) -> None:
        """Take what has been found out about the next batch of this rank, unless another rank is gone."""
        if self._error is not None:
            raise self._error
        if self._rank > 0:
            self._outgoing.put(found)
        self._begin()

    def finish(self, mine: list[T]) -> list[T]:
        """What all ranks have put, in the order of the batches; on rank 0, elsewhere nothing.

        Args:
            mine: what this rank has put.
        """
        if self._group is None:
            return mine
        self._outgoing.put(None)
        self._begin()
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._rank > 0:
            return []
        return [found for row in zip_longest(mine, *self._incoming) for found in row if found is not None]

    def _begin(self) -> None:
        """With the first batch: a thread is not to be at work while data loaders fork their workers."""
        if self._group is not None and self._thread.ident is None:
            self._thread.start()

    def _run(self, exchange: Callable[[], None]) -> None:
        try:
            exchange()
        except BaseException as error:
            self._error = error

    def _send(self) -> None:
        found: T | None = self._outgoing.get()
        while found is not None:
            dist.send_object_list([found], dst=0, group=self._group)
            found = self._outgoing.get()
        dist.send_object_list([None], dst=0, group=self._group)

    def _receive(self) -> None:
        under_way = dict(enumerate(self._incoming, start=1))
        while under_way:
            for rank, kept in list(under_way.items()):
                message: list[T | None] = [None]
                dist.recv_object_list(message, src=rank, group=self._group)
                if message[0] is None:
                    del under_way[rank]
                else:
                    kept.append(message[0])


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@cache
def _hosts() -> Any:
    """Gloo beside NCCL: what is gathered is in the hosts' memory, and gloo notices a process that has died."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT)
