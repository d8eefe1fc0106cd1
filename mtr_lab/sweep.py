"""Sweeps: a job that fails does not stop the others; a summary at the end lists the outcome of every job."""

import contextlib
import json
import multiprocessing
import shlex
import shutil
import sys
import traceback
import uuid
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from mtr_lab.cli import signals
from mtr_lab.errors import machine_error, user_errors
from mtr_lab.report.dashboard.points import differences_of, points_of
from mtr_lab.report.dashboard.runs import read_run, smaller_models
from mtr_lab.report.table import published, seed_tables, sweep_tables
from mtr_lab.results.atomic import replace_file
from mtr_lab.results.schema import FILE_NAME, Result, read_result
from mtr_lab.results.store import LOCK_NAME, Busy

ERROR_FILE = "error.json"
_locks: dict[str, FileLock] = {}
"""Of the sweeps of this process, by their id."""


@dataclass(frozen=True)
class JobResult:
    """What an evaluation returns to Hydra."""

    result: Result
    objective: float | None
    """The metric that the optimiser of a sweep asked for."""
    computed: bool
    """False if the result was finished before."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    folder: str
    status: Literal["computed", "finished", "busy", "failed"]
    error: str = ""
    """The message, if the job failed."""
    user_error: bool = False
    """Whether it failed by the user's mistake."""


class Jobs(Callback):
    """Hydra's callback for every sweep, with any launcher.

    Hydra creates one object a sweep, and launchers copy it to the processes of the jobs. Every job writes its outcome
    to a folder named after ``id``. At the end, the process that started the sweep lists the outcomes, and exits with
    code 0; with 2 if all failures are the user's mistakes; else with 1.
    """

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the folder of the outcomes, which a lock shows to be in use; remove those of sweeps that were killed."""
        mine = self._outcomes(config)
        with contextlib.suppress(OSError):  # Hydra's sweeper fails by the same error
            mine.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(mine.parent / LOCK_NAME):  # no other sweep sees the folder before it is locked
                for folder in mine.parent.glob(".sweep-*"):
                    with contextlib.suppress(Timeout), FileLock(folder / LOCK_NAME, blocking=False):
                        shutil.rmtree(folder, ignore_errors=True)
                mine.mkdir()
                _locks[self.id] = FileLock(mine / LOCK_NAME)
                _locks[self.id].acquire()
        signals.running.append(partial(self._interrupted, config))

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Let data loaders start their workers in joblib's processes, where joblib's own way of starting fails."""
        if multiprocessing.get_start_method() not in (methods := multiprocessing.get_all_start_methods()):
            multiprocessing.set_start_method(methods[0], force=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Write the job's outcome, and let the sweep continue."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        folder = Path(config.hydra.runtime.output_dir)
        returned = job_return._return_value
        outcome = Outcome(str(folder), "computed")
        if job_return.status == JobStatus.FAILED:
            busy = isinstance(returned, Busy)
            message = machine_error(returned) or f"{returned}" or repr(returned)
            user_error = isinstance(returned, user_errors())
            outcome = Outcome(str(folder), "busy" if busy else "failed", message, user_error)
            print(f"mtr_lab: {folder.name}: {outcome.error}", file=sys.stderr)
            if not busy:
                write_error(folder, returned, outcome)
        elif isinstance(returned, JobResult) and not returned.computed:
            outcome = Outcome(str(folder), "finished")
        if outcome.status in ("computed", "finished"):
            (folder / ERROR_FILE).unlink(missing_ok=True)
        with replace_file(self._outcomes(config) / f"{config.hydra.job.num}.json") as stream:
            stream.write(json.dumps(asdict(outcome)).encode())
        # Launchers return this to the sweeper, which raises the error of a failed job; an optimiser reads the value.
        job_return.status = JobStatus.COMPLETED
        job_return.return_value = returned.objective if isinstance(returned, JobResult) else None

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the outcomes.

        Raises:
            SystemExit: jobs failed.
        """
        signals.running.clear()
        outcomes = self._take(config)
        print(summary(config.hydra.sweep.dir, outcomes))
        done = [outcome.folder for outcome in outcomes if outcome.status in ("computed", "finished")]
        runs = [read_run(Path(folder, FILE_NAME), folder) for folder in done if Path(folder, FILE_NAME).exists()]
        results = [run.result for run in runs]
        lines = [*runs, *smaller_models(runs)]
        differences, _ = differences_of(lines, list(points_of(lines, ())))
        for table in [*seed_tables(results), *sweep_tables([run.result for run in lines], differences)]:
            Console().print(table)
        if runs:
            print(f"charts and differences: mtr-lab report {shlex.quote(str(config.hydra.sweep.dir))}")
        failed = [outcome for outcome in outcomes if outcome.status == "failed"]
        if failed:
            raise SystemExit(2 if all(outcome.user_error for outcome in failed) else 1)

    def _interrupted(self, config: DictConfig) -> None:
        """Print the outcomes until a signal."""
        print(summary(config.hydra.sweep.dir, self._take(config)))
        print("  interrupted: the same command computes the other points", flush=True)

    def _take(self, config: DictConfig) -> list[Outcome]:
        """Read the outcomes, and remove their files."""
        files = sorted(self._outcomes(config).glob("*.json"), key=lambda path: int(path.stem))
        outcomes = [Outcome(**json.loads(path.read_text(encoding="utf-8"))) for path in files]
        shutil.rmtree(self._outcomes(config), ignore_errors=True)
        if self.id in _locks:
            _locks.pop(self.id).release()
        return outcomes

    def _outcomes(self, config: DictConfig) -> Path:
        return Path(config.hydra.runtime.cwd, str(config.hydra.sweep.dir), f".sweep-{self.id}")


def summary(sweep: str, outcomes: list[Outcome]) -> str:
    """A line of counts, and a line for every job that failed, or whose weights have a published top-1 accuracy."""
    words = {
        "computed": "computed",
        "finished": "finished before (resume=false computes them again)",
        "busy": "being computed by another process",
        "failed": "failed",
    }
    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in words}
    parts = [f"{count} {words[status]}" for status, count in counts.items() if count]
    lines = [f"sweep {sweep}: {len(outcomes)} points: {', '.join(parts) or 'none'}"]
    for outcome in outcomes:
        if outcome.status == "failed":
            first = outcome.error.splitlines()[0]
            lines.append(f"  failed: {Path(outcome.folder).name}: {first}\n    {Path(outcome.folder) / ERROR_FILE}")
        elif (Path(outcome.folder) / FILE_NAME).exists():
            lines += [f"  {line}" for line in published(read_result(outcome.folder))]
    return "\n".join(lines)


def write_error(folder: Path, error: BaseException, outcome: Outcome) -> None:
    """Write ``error.json`` to the folder of a failed job; the job's next run replaces it."""
    record = {
        "error": outcome.error,
        "type": type(error).__name__,
        "users_mistake": outcome.user_error,
        "traceback": "".join(traceback.format_exception(error)),
    }
    with replace_file(folder / ERROR_FILE) as stream:
        stream.write(f"{json.dumps(record, indent=1, ensure_ascii=False)}\n".encode())
