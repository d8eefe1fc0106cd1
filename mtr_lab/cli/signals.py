"""The end of a program by SIGTERM or SIGINT: code 128 + the signal's number, and a line that says what is kept."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from threading import current_thread, main_thread
from typing import NoReturn

from mtr_lab.errors import machine_error

running: list[Callable[[], None]] = []
"""What to call when a signal ends the program: the sweep that it runs prints its outcomes."""


@contextlib.contextmanager
def exit_at_signals() -> Iterator[None]:
    """Raise ``SystemExit(143)`` at SIGTERM during the block, where Python would end without running its ``finally``.

    SIGINT raises ``KeyboardInterrupt`` in Python anyway. If either ends the block, a line on stderr names the signal
    and has what :func:`last_words` says, and ``running`` is called.

    Raises:
        SystemExit: with 128 + the signal's number.
    """
    if current_thread() is not main_thread() or signal.getsignal(signal.SIGTERM) is _exit:
        yield  # only the main thread may handle signals; or a caller's block handles them
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    except BaseException as error:
        number = signal_behind(error)
        if number is None:
            raise
        for again in before:
            signal.signal(again, signal.SIG_DFL)  # a second one ends at once
        line = [f"mtr_lab: ended by {signal.Signals(number).name}.", *getattr(error, "__notes__", [])]
        print(" ".join(line), file=sys.stderr, flush=True)
        for report in running:
            report()
        raise SystemExit(128 + number) from None
    finally:
        for handled, handler in before.items():
            signal.signal(handled, handler)


@contextlib.contextmanager
def last_words(say: Callable[[], str]) -> Iterator[None]:
    """Add ``say()``, what is kept and how to go on, to the line about a signal or a machine error that ends a block."""
    try:
        yield
    except BaseException as error:
        if signal_behind(error) is not None or machine_error(error) is not None:
            error.add_note(say())
        raise


def signal_behind(ending: BaseException) -> int | None:
    """The signal that an exception is from; Lightning turns ``KeyboardInterrupt`` into an exit with code 1."""
    if isinstance(ending, KeyboardInterrupt) or isinstance(ending.__context__, KeyboardInterrupt):
        return signal.SIGINT
    terminated = isinstance(ending, SystemExit) and ending.code == 128 + signal.SIGTERM
    return signal.SIGTERM if terminated or type(ending).__name__ == "SIGTERMException" else None


def _exit(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
