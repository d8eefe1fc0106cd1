"""SIGTERM and SIGINT in the middle of the work: exit code, the line that says what is kept, and what is swept up."""

import contextlib
import gc
import os
import signal
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_run import SMALL

from mtr_lab.__main__ import main
from mtr_lab.cli.signals import AGAIN, exit_at_signals
from mtr_lab.results.schema import read_result
from mtr_lab.tasks.classification.evaluation import ClassifierEvaluation

SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@pytest.fixture
def at_pass(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, signal.Signals], None]]:
    """``at_pass(3, SIGTERM)`` sends this process a signal in the third batch at an operating point from now on."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have the signal ignored
    forward_at = ClassifierEvaluation.forward_at

    def send(count: int, number: signal.Signals) -> None:
        left = iter(range(count))

        def interrupted(self, point, images):
            if next(left, 0) == count - 1:
                os.kill(os.getpid(), number)
            return forward_at(self, point, images)

        monkeypatch.setattr(ClassifierEvaluation, "forward_at", interrupted)

    yield send
    signal.signal(signal.SIGINT, inherited)


@SIGNALS
def test_an_evaluation_says_that_it_has_no_result(run_program, at_pass, number: signal.Signals) -> None:
    at_pass(2, number)
    run = run_program(main, *SMALL, "mtr.ratio=0.3")
    assert run.code == 128 + number
    line = f"mtr_lab: ended by {number.name}. {run.folder} has no result; the same command computes it.\n"
    assert run.err.endswith(line)
    assert not (run.folder / "result.json").exists()
    for name in (".predictions.npz.4194305", ".result.json.7"):  # as a process that is killed while it writes leaves it
        (run.folder / name).touch()
    (run.folder / ".mine.1").touch()
    again = run_program(main, *SMALL, "mtr.ratio=0.3")
    assert again.code == 0, again.err
    assert sorted(path.name for path in run.folder.glob(".*")) == [".hydra", ".lock", ".mine.1"]


@SIGNALS
def test_a_sweep_prints_its_summary_and_goes_on(run_program, at_pass, tmp_path: Path, number: signal.Signals) -> None:
    sweep = ("hydra.mode=MULTIRUN", f"hydra.sweep.dir={tmp_path / 'sweep'}", *SMALL, "mtr.ratio=0.2,0.3")
    (killed := tmp_path / "sweep" / ".sweep-of-a-killed-one").mkdir(parents=True)
    at_pass(5, number)  # the first job has two batches at two points
    run = run_program(main, *sweep)
    assert run.code == 128 + number
    assert "1 points: 1 computed\n  interrupted: the same command computes the other points\n" in run.out
    assert run.err.count("ended by") == 1
    assert not killed.exists()
    assert not list((tmp_path / "sweep").glob(".sweep-*"))
    again = run_program(main, *sweep)
    assert again.code == 0, again.err
    assert "2 points: 1 computed, 1 finished before" in again.out
    ratios = [read_result(file)["points"][1]["ratio"] for file in (tmp_path / "sweep").glob("*/result.json")]
    assert sorted(ratios) == [0.2, 0.3]


class Destructor:
    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


def in_a_destructor(number: signal.Signals) -> None:
    Destructor(number)


def in_a_weak_references_callback(number: signal.Signals) -> None:
    reference = weakref.ref(part := Counter(), lambda _: signal.raise_signal(number))
    del part
    assert reference() is None


def in_a_library_that_drops_all(number: signal.Signals) -> None:
    with contextlib.suppress(BaseException):
        signal.raise_signal(number)


def in_the_destructor_of_a_cycle(number: signal.Signals) -> None:
    cycle = [Destructor(number)]
    cycle.append(cycle)
    del cycle
    gc.collect()


@SIGNALS
@pytest.mark.parametrize(
    "meet",
    [in_a_destructor, in_a_weak_references_callback, in_a_library_that_drops_all, in_the_destructor_of_a_cycle],
)
def test_a_signal_whose_exception_is_dropped_is_repeated(
    capsys: pytest.CaptureFixture, meet: Callable[[signal.Signals], None], number: signal.Signals
) -> None:
    """As often as it meets code that drops exceptions; and no longer than until the program ends by it."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    finished = []

    def program() -> None:
        with exit_at_signals():
            try:
                meet(number)
                end = time.monotonic() + 20
                while time.monotonic() < end:
                    time.sleep(0.001)
                raise AssertionError("the signal is lost")
            finally:
                time.sleep(3 * AGAIN)  # what a block does at its end is not interrupted
                finished.append(True)

    try:
        with pytest.raises(SystemExit) as ending:
            program()
        time.sleep(3 * AGAIN)
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert ending.value.code == 128 + number
    assert finished
    assert capsys.readouterr().err == f"mtr_lab: ended by {number.name}.\n"


def test_a_block_without_a_signal_leaves_handlers_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), sys.unraisablehook
    with exit_at_signals():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), sys.unraisablehook) == before
