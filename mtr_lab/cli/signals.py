"""The end of a program by SIGTERM or SIGINT: code 128 + the signal's number, and a line that says what is kept."""

import contextlib
import itertools
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from threading import Lock, Timer, current_thread, main_thread
from typing import Any, NoReturn

from mtr_lab.errors import machine_error

running: list[Callable[[], None]] = []
"""What to call when a signal ends the program: the sweep that it runs prints its outcomes."""
AGAIN = 0.05
"""Seconds after which a signal is repeated whose exception was dropped."""


@contextlib.contextmanager
def exit_at_signals() -> Iterator[None]:
    """Raise ``SystemExit(143)`` at SIGTERM during the block, where Python would end without running its ``finally``.

    SIGINT raises ``KeyboardInterrupt``, unless the process ignores it. If either ends the block, a line on stderr names
    the signal and has what :func:`last_words` says, and ``running`` is called.

    Python drops exceptions in destructors and callbacks, which a signal may meet; so does an ``except`` clause of
    another library. The exception is then deallocated before it reaches the end of the block, and the signal repeated.

    Raises:
        SystemExit: with 128 + the signal's number.
    """
    if current_thread() is not main_thread() or signal.getsignal(signal.SIGTERM) is _end:
        yield  # only the main thread may handle signals; or a caller's block handles them
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.unraisablehook
    sys.unraisablehook = lambda dropped: None if isinstance(dropped.exc_value, _ENDINGS) else hook(dropped)
    signal.signal(signal.SIGTERM, _end)
    if before[signal.SIGINT] is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    try:
        yield
    except BaseException as error:
        number = signal_behind(error)
        if number is None:
            raise
        answer()
        for again in before:
            signal.signal(again, signal.SIG_DFL)  # a second one ends at once
        line = [f"mtr_lab: ended by {signal.Signals(number).name}.", *getattr(error, "__notes__", [])]
        print(" ".join(line), file=sys.stderr, flush=True)
        for report in running:
            report()
        raise SystemExit(128 + number) from None
    finally:
        answer()
        for handled, handler in before.items():
            signal.signal(handled, handler)
        sys.unraisablehook = hook


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


def answer() -> None:
    """Repeat no signal whose exception is deallocated from now on: the caller has caught it, and ends."""
    with _lock:
        _unanswered.clear()


class _Terminated(SystemExit):
    """Unlike its base class, it can be watched by ``weakref.finalize``."""


class _Interrupted(KeyboardInterrupt):
    """Unlike its base class, it can be watched by ``weakref.finalize``."""


_ENDINGS = (_Terminated, _Interrupted)
_numbers = itertools.count()
_unanswered: dict[int, int] = {}
"""The signals whose exception has not ended a block, by the number of the exception."""
_lock = Lock()
"""Held while a signal is repeated, and while that is called off."""


def _end(number: int, frame: object) -> NoReturn:
    ending: Any = _Interrupted() if number == signal.SIGINT else _Terminated(128 + number)
    exception = next(_numbers)
    _unanswered[exception] = number
    weakref.finalize(ending, _dropped, exception).atexit = False
    try:
        raise ending
    finally:
        del ending  # this frame, which the traceback has, would keep it alive


def _dropped(exception: int) -> None:
    """Repeat a signal from another thread, when this one has left the destructor or callback."""
    if exception in _unanswered:
        repetition = Timer(AGAIN, _repeat, [exception])
        repetition.daemon = True
        repetition.start()


def _repeat(exception: int) -> None:
    with _lock:
        if exception in _unanswered:
            os.kill(os.getpid(), _unanswered.pop(exception))
