"""Run the programs in this process, as the command line does."""

import contextlib
import copy
import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as mtr_lab does, which comes too late after torch

import torch
import yaml

from mtr_lab.configuration import CONF

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported, by torchvision among others

with contextlib.suppress(ImportError):  # OpenVINO and TensorBoard import it
    from absl import logging as absl_logging

    # Its handler keeps the stderr of its import, which is pytest's, and closes it when Hydra configures logging.
    absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__


_load_yaml, _parsed = yaml.load, {}


def _load_yaml_once(stream: Any, Loader: type) -> Any:
    """Parse each file of the package's configuration once in this process: a program reads dozens of them."""
    name = str(getattr(stream, "name", ""))
    if not name.startswith(str(CONF)):
        return _load_yaml(stream, Loader)
    key = name, Loader.__qualname__, stream.read()
    if key not in _parsed:
        _parsed[key] = _load_yaml(key[2], Loader)
    return copy.deepcopy(_parsed[key])


yaml.load = _load_yaml_once


def _with_room(function: Callable, **arguments: Any) -> None:
    __tracebackhide__ = True
    function(**arguments)


# CPython keeps frames in chunks of 16 KiB, and maps and unmaps one at every call that crosses a chunk's end. A frame
# that claims 512 KiB gets a chunk of 1 MiB, whose rest holds all that a test calls.
_with_room.__code__ = _with_room.__code__.replace(co_stacksize=2**16)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Give every test a chunk for its frames: up to half of the time under Triton's interpreter."""
    pyfuncitem.obj = functools.partial(_with_room, pyfuncitem.obj)
    return (yield)


def pytest_collection_finish() -> None:
    """Keep what imports and the collection made out of later garbage collections: it lives as long as the process."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable:
    """Call a program with arguments: ``run_command(main, "dog.jpg")`` -> exit code, stdout, stderr."""

    def run(main: Callable[[], None], *arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["mtr_lab", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as error:
            code = error.code
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture
def run_program(tmp_path: Path, run_command: Callable) -> Callable:
    """Call a program with overrides: ``run_program(main, "mtr.ratio=0.3")`` -> exit code, stdout, stderr, folder."""

    def run(main: Callable[[], None], *overrides: str) -> SimpleNamespace:
        folder = tmp_path / "run"
        return SimpleNamespace(**vars(run_command(main, f"hydra.run.dir={folder}", *overrides)), folder=folder)

    return run


@pytest.fixture
def result() -> dict:
    """A result of three points, to change at will."""
    from example_result import RESULT

    return copy.deepcopy(RESULT)
