"""Run folders that several processes share, and what of them may be used again.

Locks are the operating system's own (flock), so whoever dies loses them, and no lock has to be judged stale.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from mtr_lab.errors import UserError
from mtr_lab.results import predictions_file
from mtr_lab.results import schema as result_file
from mtr_lab.results.keys import Key
from mtr_lab.results.predictions import Predictions, point_name
from mtr_lab.results.predictions_file import load_predictions, save_predictions
from mtr_lab.results.schema import Result, read_result, write_result

LOCK_NAME = ".lock"


class Busy(UserError):
    """Another process is writing to this run folder."""


@contextlib.contextmanager
def claim(folder: Path, wait: bool = False) -> Iterator[None]:
    """Be the only process that writes to a run folder.

    Raises:
        Busy: another process is, and ``wait`` is false.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(blocking=wait)
    except Timeout as error:
        raise Busy(f"{folder}: another process is computing this. Wait for it, or choose another folder.") from error
    try:
        yield
    finally:
        lock.release()


def find_finished(folder: Path, key: Key, sweep: Path | None = None) -> Path | None:
    """The folder of a finished evaluation with this key: ``folder`` itself, or another point's of the same sweep.

    A result that is there but cannot be used is named, with the reason, on the terminal.
    """
    problem = _problem(folder, key) if (folder / result_file.FILE_NAME).exists() else "nothing is there"
    if problem is None:
        return folder
    others = sorted(path.parent for path in sweep.glob(f"*/{result_file.FILE_NAME}")) if sweep else []
    found = next((other for other in others if other != folder and _problem(other, key) is None), None)
    if found is None and (folder / result_file.FILE_NAME).exists():
        print(f"{folder}: {problem}; computing it again.")
    return found


def _problem(folder: Path, key: Key) -> str | None:
    """Why the result in a folder is not the finished evaluation with this key."""
    try:
        result = read_result(folder)
        found = result.get("key")
        if found != key:
            differ = [part for part in key if part not in (found or {}) or found[part] != key[part]]  # type: ignore[index,literal-required]
            return f"the result there is of other {' and '.join(differ)}"
        stored = load_predictions(folder)
    except UserError as error:
        return f"the result there cannot be trusted ({error})"
    if stored.points.tolist() != [point_name(point["policy"], point["ratio"]) for point in result["points"]]:
        return f"{result_file.FILE_NAME} and {predictions_file.FILE_NAME} there are not of the same run"
    return None


def write_run(result: Result, predictions: Predictions, folder: Path) -> list[Path]:
    """Write both files of a run; ``result.json`` comes last, so that where it is the run is complete."""
    (folder / result_file.FILE_NAME).unlink(missing_ok=True)
    predictions_path = save_predictions(predictions, folder)
    return [write_result(result, folder), predictions_path]


class UnreducedCache:
    """The unreduced model's predictions, computed by one point of a sweep and read by the others.

    ``lock`` is held by whoever computes them.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.lock = FileLock(folder / LOCK_NAME)

    @contextlib.contextmanager
    def try_lock(self) -> Iterator[bool]:
        """Whether the lock could be had without waiting; inside, it is held if so."""
        try:
            self.lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            self.lock.release()

    def load(self) -> Predictions | None:
        """What is there, ``None`` if nothing is or it is damaged, which is said on the terminal."""
        if not (self.folder / predictions_file.FILE_NAME).exists():
            return None
        try:
            return load_predictions(self.folder)
        except UserError as error:
            print(f"the unreduced model's predictions cannot be trusted ({error}); computing them again.")
            return None

    def save(self, predictions: Predictions) -> None:
        """Store point 0."""
        save_predictions(predictions.select(slice(1)), self.folder)
