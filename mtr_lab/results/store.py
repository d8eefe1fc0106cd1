"""Run folders that several processes share: locks, finished evaluations, the unreduced model's predictions.

Locks are flocks: the operating system releases them when a process dies, so there are no stale locks.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mtr_lab.errors import UserError
from mtr_lab.results import predictions_file
from mtr_lab.results import schema as result_file
from mtr_lab.results.atomic import remove_unfinished
from mtr_lab.results.keys import Key
from mtr_lab.results.predictions import Predictions, name_of
from mtr_lab.results.predictions_file import load_predictions, save_predictions
from mtr_lab.results.schema import Result, read_result, write_result

LOCK_NAME = ".lock"


class Busy(UserError):
    """Another process is writing to this run folder."""


@contextlib.contextmanager
def claim(folder: Path, wait: bool = False) -> Iterator[None]:
    """Lock a run folder, which is created if it is missing: no other process can claim it during the block.

    What a killed process has left there unfinished is removed.

    Raises:
        Busy: another process holds the lock, and ``wait`` is false.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(blocking=wait)
    except Timeout as error:
        raise Busy(f"{folder}: another process is computing this. Wait for it, or choose another folder.") from error
    try:
        for place in (folder, folder / result_file.PICTURES):
            remove_unfinished(place)
        yield
    finally:
        lock.release()


def find_finished(folder: Path, key: Key, sweep: Path | None = None) -> Path | None:
    """The folder of a finished evaluation with this key, ``None`` if there is none.

    Looks in ``folder``, then in the other jobs of ``sweep``, the folder of a sweep. If none can be used but ``folder``
    has a result, the reason why that cannot is printed.
    """
    problem = _problem(folder, key) if (folder / result_file.FILE_NAME).exists() else "there is no result"
    if problem is None:
        return folder
    others = sorted(path.parent for path in sweep.glob(f"*/{result_file.FILE_NAME}")) if sweep else []
    finished = next((other for other in others if other != folder and _problem(other, key) is None), None)
    if finished is None and (folder / result_file.FILE_NAME).exists():
        print(f"{folder}: {problem}; computing it again.")
    return finished


def _problem(folder: Path, key: Key) -> str | None:
    """Why the result in a folder cannot be used for an evaluation with this key, ``None`` if it can."""
    try:
        result = read_result(folder)
        stored_key: Mapping[str, Any] = result.get("key") or {}
        if stored_key != key:
            differ = [part for part, value in key.items() if stored_key.get(part) != value]
            return f"its result is of other {' and '.join(differ)}"
        stored = load_predictions(folder)
    except UserError as error:
        return f"its result cannot be trusted ({error})"
    if stored.points.tolist() != [name_of(point) for point in result["points"]]:
        return f"its {result_file.FILE_NAME} and {predictions_file.FILE_NAME} are of different runs"
    return None


def write_run(result: Result, predictions: Predictions, folder: Path) -> list[Path]:
    """Write both files of a run, ``result.json`` last: a folder that has it is complete."""
    (folder / result_file.FILE_NAME).unlink(missing_ok=True)
    predictions_path = save_predictions(predictions, folder)
    return [write_result(result, folder), predictions_path]


class UnreducedCache:
    """The unreduced model's predictions, computed by one job of a sweep and read by the others.

    Hold ``lock`` to compute and save them.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.lock = FileLock(folder / LOCK_NAME)

    @contextlib.contextmanager
    def try_lock(self) -> Iterator[bool]:
        """Take the lock without waiting; yields whether this process holds it during the block."""
        try:
            self.lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            remove_unfinished(self.folder)
            yield True
        finally:
            self.lock.release()

    def load(self) -> Predictions | None:
        """The stored predictions; ``None`` if there are none or they are damaged (prints why)."""
        if not (self.folder / predictions_file.FILE_NAME).exists():
            return None
        try:
            return load_predictions(self.folder)
        except UserError as error:
            print(f"the unreduced model's predictions cannot be trusted ({error}); computing them again.")
            return None

    def save(self, predictions: Predictions) -> None:
        """Store the predictions of point 0, the unreduced model."""
        save_predictions(predictions.select(slice(1)), self.folder)
