"""Messages between the processes of an evaluation, over the hosts' network: broadcasts, and gathering on rank 0."""

import contextlib
from collections.abc import Callable
from datetime import timedelta
from functools import cache, partial
from queue import Full, Queue
from threading import Thread
from typing import Any, Generic, TypeVar

import torch.distributed as dist

T = TypeVar("T")

AHEAD = 8
"""Batches whose results wait in a process. One that is further ahead of the others waits: they end together anyway."""
TIMEOUT = timedelta(days=1)
"""Of worker ranks. Long, because rank 0 also times models and waits for locks; a dead rank 0 is detected at once."""


def of_all_ranks(value: T) -> list[T]:
    """The values of all processes, anything that can be pickled, by rank; every process has to call it."""
    if not _is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_host_group())
    return values


def from_rank_zero(value: T) -> T:
    """Broadcast rank 0's ``value``, anything that can be pickled; a single process keeps its own."""
    if not _is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_host_group())
    return values[0]


class Gathering(Generic[T]):
    """Delivers the results of all ranks on rank 0, in a thread that sends them while the next batches are computed.

    Every process has to make one. Rank r of w computes batches r, r + w, r + 2w, …. A result is anything that can be
    pickled, except ``None``. A rank keeps no result that it has sent.

    Args:
        deliver: called on rank 0 with the result of every batch, in the order of the batches.
        alone: this process computes all batches; it sends and receives nothing.
    """

    def __init__(self, deliver: Callable[[T], object], alone: bool = False) -> None:
        self._deliver = deliver
        # A collective call: all ranks make it together.
        self._group = _host_group() if not alone and _is_distributed() else None
        self._own: Queue[T | None] = Queue(AHEAD)
        self._error: BaseException | None = None
        exchange = self._send if self._group is not None and dist.get_rank() > 0 else self._receive
        # A daemon: a process that fails does not wait for messages of the others.
        self._thread = Thread(target=self._run, args=[exchange], daemon=True)

    def put(self, result: T) -> None:
        """Queue the result of this rank's next batch; raises the error of an earlier transfer."""
        if self._group is None:
            self._deliver(result)
        else:
            self._queue(result)

    def finish(self) -> None:
        """Wait until all results of this rank are sent, on rank 0 until all results of all ranks are delivered."""
        if self._group is None:
            return
        self._queue(None)
        self._thread.join()
        self._check()

    def _queue(self, result: T | None) -> None:
        if self._thread.ident is None:  # not before the first batch: data loaders fork their workers until then
            self._thread.start()
        while True:
            self._check()
            with contextlib.suppress(Full):
                return self._own.put(result, timeout=1)  # then look whether the thread has failed

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self, exchange: Callable[[], None]) -> None:
        try:
            exchange()
        except BaseException as error:
            self._error = error

    def _send(self) -> None:
        while (result := self._own.get()) is not None:
            dist.send_object_list([result], dst=0, group=self._group)
        dist.send_object_list([None], dst=0, group=self._group)

    def _receive(self) -> None:
        sources: list[Callable[[], T | None]] = [self._own.get]
        sources += [partial(self._receive_from, rank) for rank in range(1, dist.get_world_size())]
        while sources:
            for source in list(sources):
                result = source()
                if result is None:
                    sources.remove(source)
                else:
                    self._deliver(result)

    def _receive_from(self, rank: int) -> T | None:
        message: list[T | None] = [None]
        dist.recv_object_list(message, src=rank, group=self._group)
        return message[0]


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@cache
def _host_group() -> Any:
    """Gloo, besides NCCL: results are in host memory, and gloo notices when a process has died."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT)
