"""The bar of an evaluation: one line with the phase at work and the time left for all phases."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

Advance = Callable[[float, str], None]
"""Tells a phase's bar the share that is done, 0 to 1, and what is at work, which may be empty."""


def _ignore(share: float, detail: str = "") -> None:
    """The advance of a bar that is not shown."""


class Phases:
    """A bar over phases whose costs are known relative to each other.

    On a terminal the bar is redrawn in place; elsewhere the name of each phase is printed once, when it begins. A phase
    without a cost, such as one before the costs are known, has a bar that moves to and fro.

    Args:
        shown: whether anything is shown.
    """

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown
        self.costs: dict[str, float] = {}
        self._console = Console(file=sys.stdout)

    def begin(self, costs: Mapping[str, float]) -> None:
        """Start to count: the costs of the phases to come by name, in their order; any unit."""
        self.costs = dict(costs)
        self._done = 0.0  # cost of the finished phases
        self._begun = time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[Advance]:
        """Show a phase while the block runs."""
        if self.shown and not self._console.is_terminal:
            print(f"{name} …", flush=True)
        if not self.shown or not self._console.is_terminal:
            yield _ignore
        elif name not in self.costs:
            with Progress(TextColumn(name), BarColumn(None), console=self._console, transient=True) as bar:
                bar.add_task(name, total=None)
                yield _ignore
        else:
            cost, before = self.costs.pop(name), self._done
            columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[left]}"))
            with Progress(*columns, console=self._console, transient=True, refresh_per_second=4) as bar:
                task = bar.add_task(name, total=before + cost + sum(self.costs.values()), left="")

                def advance(share: float, detail: str = "") -> None:
                    done = before + share * cost
                    text = f"{name} {detail}".strip()
                    bar.update(task, completed=done, description=text, left=self._left(done, cost * (1 - share)))

                advance(0.0)
                yield advance
            self._done = before + cost

    def _left(self, done: float, rest: float) -> str:
        elapsed = time.monotonic() - self._begun
        if not done or elapsed < 1:
            return ""
        seconds = round(elapsed / done * (rest + sum(self.costs.values())))
        return f"{seconds // 60}:{seconds % 60:02} left"


class BatchWatch(Callback):
    """Lightning's hooks that tell a bar which point of which batch is at work."""

    def __init__(self) -> None:
        self.advance: Advance | None = None
        self._batches = 0

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._batches = sum(int(count) for count in trainer.num_test_batches)

    def on_test_batch_start(
        self, trainer: Trainer, module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        def watch(place: int) -> None:
            if self.advance is not None:
                count, point = len(module.points), module.points[place]
                name = point.name if point.schedule.acts else "unreduced"
                share = (batch_idx + place / count) / self._batches
                self.advance(share, f"{name} · {place + 1}/{count}, batch {batch_idx + 1}/{self._batches}")

        module.watch = watch
