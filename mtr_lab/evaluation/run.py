"""Evaluate a backbone unreduced and reduced: accuracy, FLOPs and speed, as one result in the run folder."""

import contextlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from mtr_lab.cli.folders import sweep_folder
from mtr_lab.cli.program import is_rank_zero
from mtr_lab.cli.signals import last_words
from mtr_lab.errors import UserError
from mtr_lab.evaluation.drawing import draw_images
from mtr_lab.evaluation.job import Job, plan
from mtr_lab.evaluation.passes import PassResult, predict, reduced_model, releasing_workers, serve_passes
from mtr_lab.evaluation.points import describe_points, strongest
from mtr_lab.evaluation.progress import Phases
from mtr_lab.evaluation.timing import time_job
from mtr_lab.launch import launch
from mtr_lab.measure.speed import images_timed
from mtr_lab.report.loggers import log_result
from mtr_lab.report.table import result_table
from mtr_lab.results.environment import describe_environment
from mtr_lab.results.predictions_file import FILE_NAME as PREDICTIONS
from mtr_lab.results.schema import FILE_NAME as RESULT
from mtr_lab.results.schema import PICTURES, Point, Result, read_result, write_result
from mtr_lab.results.store import UnreducedCache, claim, find_finished, write_run
from mtr_lab.sweep import JobResult


def evaluate(config: DictConfig) -> JobResult | None:
    """Run the evaluation that ``conf/config.yaml`` describes; write the result, print it as a table and log it.

    Mistakes are found on a model without weights, before weights are loaded. After that, ``mtr.schedule=auto`` and
    ``mtr.max_drop`` are measured on training images, ``mtr.speedup`` on the device. A result of the same code, weights
    and data is not computed again.

    Returns:
        The result, as in the file ``result.json`` of the run folder. With ``trainer=ddp``, rank 0 returns it, which
        alone writes, times and draws; the other processes return nothing. See ``mtr_lab.launch``.

    Raises:
        UserError: the configuration has a mistake, or another process uses the run folder.
    """
    phases = Phases(shown=config.trainer.enable_progress_bar and is_rank_zero())
    with phases.phase(LOAD):
        job = plan(config)
    if job.launches:
        with claim(job.folder, wait=job.wait):
            finished = take_finished(job)
            if finished is None:
                start_over(job.folder)
        with last_words(lambda: kept(job.folder)):
            return finished or JobResult(**launch(evaluated, config, job.trainer.num_devices))
    if job.trainer.world_size > 1:
        job.trainer.strategy.setup_environment()
        if not job.trainer.is_global_zero:
            serve_passes(job)
            return None
    return lead(job, phases)


def evaluated(config: DictConfig) -> dict[str, Any] | None:
    """A launched process's part, and its result in plain containers."""
    result = evaluate(config)
    return None if result is None else asdict(result)


def kept(folder: Path) -> str:
    """What a signal leaves of an evaluation."""
    if (folder / RESULT).exists():
        return f"{folder} has its result; the same command shows it."
    return f"{folder} has no result; the same command computes it."


def lead(job: Job, phases: Phases) -> JobResult:
    """Rank 0's part, or that of a single process: claim the run folder, measure, write, print and log."""
    with last_words(lambda: kept(job.folder)), claim(job.folder, wait=job.wait), releasing_workers():
        finished = take_finished(job)
        if finished is not None:
            return finished
        start_over(job.folder)
        write(job, measure(job, phases))
        return JobResult(*hand_over(job, job.folder), computed=True)


@dataclass(frozen=True)
class Measurement:
    """What was measured at the operating points."""

    run: PassResult
    points: list[Point]
    batch_size: int | None
    """Images at once, where the device had no memory for ``dataset.batch_size``."""


def measure(job: Job, phases: Phases) -> Measurement:
    """Predict, time and draw: the passes over the images, the timing pass, and the pictures."""
    phases.begin(costs(job))
    with phases.phase(SCHEDULES):
        reduction, points = reduced_model(job)
        evaluation = job.task.evaluation(job.model, reduction, points, job.config.trainer.cuda_graph)
    sweep = sweep_folder()
    cache = None if sweep is None else UnreducedCache(sweep / "unreduced" / job.unreduced_key)
    with phases.phase(EVALUATE) as job.watch.advance:
        run = predict(evaluation, points, job.trainer, job.batches, cache)
    speeds = {}
    if job.config.timing.batch_size:
        with phases.phase(TIME) as advance:
            speeds = time_job(job, evaluation, points, lambda share: advance(share, ""))
    if job.config.pictures:
        with phases.phase(PICTURES_PHASE) as advance:
            draw_images(job, evaluation, [points[0], strongest(points)], lambda share: advance(share, ""))
    with phases.phase(INTERVALS):
        described = describe_points(
            job.task,
            job.model,
            points,
            run.predictions,
            run.skipped,
            speeds,
            with_memory=not job.config.trainer.cuda_graph,
        )
    return Measurement(run, described, evaluation.batch_size)


LOAD, SCHEDULES, EVALUATE, TIME = "load", "schedules", "evaluate", "time"
PICTURES_PHASE, INTERVALS = "pictures", "intervals"


def costs(job: Job) -> dict[str, float]:
    """What the phases of an evaluation cost, in forward passes of one image."""
    points, config = len(job.points), job.config
    loader: Any = job.data.test_dataloader()
    batches = limited(len(loader), config.trainer.limit_test_batches)
    images = batches * config.dataset.batch_size
    timed = images_timed(config.timing.batch_size) if config.timing.batch_size else 0
    drawn = 3 * config.pictures  # at two points, then block by block
    return {
        SCHEDULES: 1 if job.calibration is None else len(job.calibration),
        EVALUATE: images * points,
        TIME: timed * points,
        PICTURES_PHASE: drawn,
        INTERVALS: 0.02 * images * points,
    }


def limited(batches: int, limit: float) -> int:
    """The number of batches with Lightning's limit: a number, or a share as a float."""
    return min(batches, limit) if isinstance(limit, int) else max(1, int(batches * limit))


def write(job: Job, measured: Measurement) -> None:
    """Write ``result.json`` and ``predictions.npz`` to the run folder."""
    run = measured.run
    result: Result = {
        "schema": 2,
        "task": job.task.name,
        "backbone": job.config.backbone.name,
        "dataset": job.data.name,
        "weights": job.task.backbone(job.model).weights,
        "key": job.key,
        "unreduced": {"key": job.unreduced_key, "reused": run.reused},
        "logged": [],
        "config": job.record,
        "environment": {**describe_environment(), "device": job.machine.device},
        "points": measured.points,
    }
    if measured.batch_size is not None:
        result["batch_size"] = measured.batch_size
    for file in write_run(result, run.predictions, job.folder):
        print(f"wrote {file}")


def take_finished(job: Job) -> JobResult | None:
    """Hand over a finished result with the job's key, in the claimed run folder or elsewhere in the sweep."""
    finished = find_finished(job.folder, job.key, sweep_folder()) if job.config.resume else None
    if finished is None:
        return None
    print(f"{finished}: finished before; resume=false computes it again.")
    with contextlib.nullcontext() if finished == job.folder else claim(finished, wait=True):
        return JobResult(*hand_over(job, finished), computed=False)


def hand_over(job: Job, folder: Path) -> tuple[Result, float | None]:
    """Print a finished result and give it to the loggers that have not logged it yet, which the result then names.

    Returns:
        The result as it is stored, and its ``objective``.
    """
    result = read_result(folder)
    Console().print(result_table(result))
    logged = result.setdefault("logged", [])
    for name, logger in job.loggers.items():
        if name not in logged:
            log_result(result, [folder / RESULT, folder / PREDICTIONS], logger, pictures=folder / PICTURES)
            logged.append(name)
            write_result(result, folder)  # at once: if the next logger fails, resuming does not log to this one again
    return result, objective_value(result, job.config.objective)


def start_over(folder: Path) -> None:
    """Remove the result and the pictures of an earlier evaluation with another key from a run folder."""
    (folder / RESULT).unlink(missing_ok=True)
    shutil.rmtree(folder / PICTURES, ignore_errors=True)


def objective_value(result: Result, metric: str | None) -> float | None:
    """The mean of a metric over the reduced points; ``None`` without a metric.

    Raises:
        UserError: a point has no figure of this metric, since no image could be read.
    """
    if metric is None:
        return None
    points: list[dict[str, Any]] = [dict(point) for point in result["points"]]
    values = [point[metric] for point in points if point["policy"] != "none"]
    if None in values:
        raise UserError(f"objective={metric}: the result has no such figure, since no image could be read.")
    return fmean(values)
