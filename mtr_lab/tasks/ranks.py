"""Messages between the processes of an evaluation, over the hosts' network: broadcasts, and gathering on rank 0."""

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
"""Of worker ranks. Long, because rank 0 also times models and waits for locks; a dead rank 0 is detected at once."""


def from_rank_zero(value: T) -> T:
    """Broadcast rank 0's ``value``, anything that can be pickled; a single process keeps its own."""
    if not _is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_host_group())
    return values[0]


class Gathering(Generic[T]):
    """Collects the results of all ranks on rank 0, in a thread that sends them while the next batches are computed.

    Every process has to make one. Rank r of w computes batches r, r + w, r + 2w, …. A result is anything that can be
    pickled, except ``None``.

    Args:
        alone: this process computes all batches; it sends and receives nothing.
    """

    def __init__(self, alone: bool = False) -> None:
        # A collective call: all ranks make it together.
        self._group = _host_group() if not alone and _is_distributed() else None
        self._rank, ranks = (dist.get_rank(), dist.get_world_size()) if self._group is not None else (0, 1)
        self._outgoing: SimpleQueue[T | None] = SimpleQueue()
        self._incoming: list[list[T]] = [[] for _ in range(1, ranks)]
        self._error: BaseException | None = None
        exchange = self._send if self._rank > 0 else self._receive
        # A daemon: a process that fails does not wait for messages of the others.
        self._thread = Thread(target=self._run, args=[exchange], daemon=True)

    def put(self, result: T) -> None:
        """Queue the result of this rank's next batch; raises the error of an earlier transfer."""
        if self._error is not None:
            raise self._error
        if self._rank > 0:
            self._outgoing.put(result)
        self._start()

    def finish(self, own: list[T]) -> list[T]:
        """The results of all ranks in the order of the batches, on rank 0; an empty list on the others.

        Args:
            own: the results of this rank.
        """
        if self._group is None:
            return own
        self._outgoing.put(None)
        self._start()
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._rank > 0:
            return []
        return [result for row in zip_longest(own, *self._incoming) for result in row if result is not None]

    def _start(self) -> None:
        """Start the thread with the first batch: it must not run while data loaders fork their workers."""
        if self._group is not None and self._thread.ident is None:
            self._thread.start()

    def _run(self, exchange: Callable[[], None]) -> None:
        try:
            exchange()
        except BaseException as error:
            self._error = error

    def _send(self) -> None:
        result: T | None = self._outgoing.get()
        while result is not None:
            dist.send_object_list([result], dst=0, group=self._group)
            result = self._outgoing.get()
        dist.send_object_list([None], dst=0, group=self._group)

    def _receive(self) -> None:
        active = dict(enumerate(self._incoming, start=1))
        while active:
            for rank, results in list(active.items()):
                message: list[T | None] = [None]
                dist.recv_object_list(message, src=rank, group=self._group)
                if message[0] is None:
                    del active[rank]
                else:
                    results.append(message[0])


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@cache
def _host_group() -> Any:
    """Gloo, besides NCCL: results are in host memory, and gloo notices when a process has died."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT)
