"""Log a finished result with Lightning loggers: curves for all, a table and an artifact for Weights & Biases."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from mtr_lab.image_file import open_image, reason
from mtr_lab.report.axes import COSTS, SPEEDS
from mtr_lab.report.wandb_login import wandb_mode
from mtr_lab.results.metrics import accuracy, all_metrics
from mtr_lab.results.predictions import name_of
from mtr_lab.results.schema import Point, Result, plain_files

_GROUP_LENGTH = 128  # the longest that W&B accepts


def log_result(
    result: Result, files: Sequence[str | Path], loggers: Logger | Iterable[Logger], pictures: Path | None = None
) -> None:
    """Log a result, and close the loggers.

    Every policy becomes a set of curves, "mtr/top1", "mtr/kl" and so on, with the ends of their intervals. Their step
    is the asked share of FLOPs to remove, in whole percent (the achieved share if none was asked); step 0 is the
    unreduced model. So a CSV file has one row per ratio, and TensorBoard draws accuracy against reduction. The run's
    first policy also has curves without its name, "top1", "kl", "speedup" and so on, so that runs of several policies
    share a chart. TensorBoard's table of hyperparameters has the figures at the highest ratio, and its images the
    pictures.

    Weights & Biases also receives a table of the points, two charts (accuracy against FLOPs removed, tokens entering
    each block), the pictures, and the files as an artifact. The run's summary has "mtr@0.4/top1" and so on, by which
    runs are compared.

    Args:
        result: its configuration is logged as hyperparameters.
        files: ``result.json`` and the files that belong to it.
        loggers: one, several, or none.
        pictures: folder of PNG files, see ``log_pictures``; it may not exist.
    """
    task, backbone, dataset, config = result["task"], result["backbone"], result["dataset"], result["config"]
    hyperparameters = {"task": task, "backbone": backbone, "dataset": dataset, "config": config}
    for logger in [loggers] if isinstance(loggers, Logger) else loggers:
        try:
            if isinstance(logger, TensorBoardLogger):
                # Separate names: TensorBoard would draw the metrics of hyperparameters as curves at step 0. Its table
                # shows the first five hyperparameters by name: backbone, dataset, policy, reduction, one setting.
                best = {f"highest_ratio/{key}": value for key, value in _last(result["points"]).items()}
                policy, members = _by_policy(result["points"])[0]
                reduction = max(point["reduction"] or 0.0 for point in members)
                chosen = {"policy": policy, "reduction": round(reduction, 3)}
                named = {"task": task, "backbone": backbone, "dataset": dataset, **chosen, "settings": config}
                logger.log_hyperparams(named, best)
                if pictures is not None:
                    _pictures_to_tensorboard(logger.experiment, pictures)
            else:
                logger.log_hyperparams(hyperparameters)
            for step, metrics in _curves(result["points"]):
                logger.log_metrics(metrics, step)
            logger.save()
            if isinstance(logger, WandbLogger):
                _log_to_wandb(logger.experiment, result, files)
                if pictures is not None:
                    log_pictures(logger.experiment, pictures)
        except BaseException:
            _close(logger, failed=True)
            raise
        _close(logger, failed=False)


def _close(logger: Logger, failed: bool) -> None:
    logger.finalize("failed" if failed else "success")
    if isinstance(logger, WandbLogger):
        logger.experiment.finish(exit_code=int(failed))  # or the next job of a sweep would continue this run


def wandb_logger(project: str, save_dir: str, group: str | None = None, **options: Any) -> WandbLogger:
    """A Weights & Biases logger that never asks for a login: without one, the run is stored in ``save_dir/wandb``.

    ``wandb sync save_dir/wandb/offline-run-*`` uploads such a run later. ``WANDB_MODE`` overrides the choice.
    ``group`` names the sweep that the run belongs to.
    """
    mode = os.environ.get("WANDB_MODE") or wandb_mode()  # wandb_mode knows two modes, W&B has more
    group = group and group[-_GROUP_LENGTH:]
    logger = WandbLogger(project=project, save_dir=save_dir, mode=mode, group=group, **options)
    logger._wandb_init.pop("anonymous", None)  # Lightning always passes it; new versions of W&B warn about it
    return logger


def _curves(points: list[Point]) -> list[tuple[int, dict[str, float]]]:
    """(step, figures) by rising step."""
    rows: dict[float, dict[str, float]] = {}
    for first, (policy, members) in enumerate(_by_policy(points)):
        for point in members:
            share = point["reduction"] if point["ratio"] is None else point["ratio"]
            numbers = _numbers(point)
            row = rows.setdefault(share or 0.0, {})
            row |= {f"{policy}/{key}": value for key, value in numbers.items()}
            if first == 0:
                row |= {key: value for key, value in numbers.items() if key in _curve_keys()}
    return [(round(100 * share), rows[share]) for share in sorted(rows)]


def _numbers(point: Point) -> dict[str, float]:
    """The figures of a point that become curves, and the ends of their intervals."""
    keys = {f"{key}{end}" for key in _curve_keys() for end in ("", "_lo", "_hi")}
    return {key: value for key, value in _flat(point).items() if key in keys and value is not None}


def _last(points: list[Point]) -> dict[str, float]:
    """The figures of the first policy at its highest ratio."""
    _, members = _by_policy(points)[0]
    figures = _numbers(max(members, key=lambda point: point["reduction"] or 0.0))
    return {key: value for key, value in figures.items() if key in _curve_keys()}


def _pictures_to_tensorboard(writer: Any, folder: Path) -> None:
    import numpy as np

    for path in sorted(folder.glob("*.png")):
        try:
            with open_image(path) as picture:
                writer.add_image(f"pictures/{path.stem}", np.asarray(picture.convert("RGB")), dataformats="HWC")
        except Exception as error:  # damaged bytes make Pillow raise anything from OSError to struct.error
            print(f"{path} is not logged, since it cannot be read: {reason(error)}")


def _curve_keys() -> list[str]:
    """The figures of a point that become curves: metrics, costs and speeds."""
    return [*(metric.key for metric in all_metrics()), *(axis.key for axis in (*COSTS, *SPEEDS))]


def _by_policy(points: list[Point]) -> list[tuple[str, list[Point]]]:
    """Each policy with its points, the unreduced model first; the unreduced model alone if there is no policy."""
    unreduced = [point for point in points if point["policy"] == "none"]
    policies = list(dict.fromkeys(point["policy"] for point in points if point["policy"] != "none"))
    if not policies:
        return [("none", unreduced)]
    return [(name, unreduced + [point for point in points if point["policy"] == name]) for name in policies]


def _flat(point: Point) -> dict[str, Any]:
    """A point with a number per key: intervals as KEY_lo and KEY_hi, the first and last of tokens, skipped counted."""
    flat: dict[str, Any] = {}
    value: Any
    for key, value in point.items():
        if key.endswith("_ci"):
            name = key.removesuffix("_ci")
            flat[f"{name}_lo"], flat[f"{name}_hi"] = value
        elif key == "latency_ms":
            flat |= {f"latency_{percentile}": time for percentile, time in value.items()}
        elif key == "budget":
            flat |= {f"{value['key']}_{name}": value[name] for name in ("asked", "promised", "measured")}
        elif key == "tokens":
            flat |= {"tokens_first": value[0], "tokens_last": value[-1]} if value else {}
        elif key == "skipped":
            flat["skipped"] = len(value)
        else:
            flat[key] = value
    return flat


def log_pictures(run: Any, folder: Path) -> list[str]:
    """Log every PNG file in a folder to a W&B run, as "pictures/NAME"; name those that cannot be read on the terminal.

    Returns:
        The names of the logged pictures; none if the folder does not exist.
    """
    import wandb

    logged = []
    for path in sorted(path for path in plain_files(folder) if path.suffix == ".png"):
        try:
            picture = wandb.Image(str(path), caption=path.stem)
        except Exception as error:  # damaged bytes make Pillow raise anything from OSError to struct.error
            print(f"{path} is not logged, since it cannot be read: {reason(error)}")
            continue
        run.log({f"pictures/{path.stem}": picture})
        logged.append(path.stem)
    return logged


def _log_to_wandb(run: Any, result: Result, files: Sequence[str | Path]) -> None:
    import wandb

    run.config.update({key: result[key] for key in ("weights", "key", "environment") if key in result})
    points = result["points"]
    flat = [_flat(point) for point in points]
    columns: list[str | int] = list(dict.fromkeys(key for row in flat for key in row))
    tokens = [[name_of(point), block, count] for point in points for block, count in enumerate(point["tokens"])]
    table = wandb.Table(columns=["point", "block", "tokens"], data=tokens)
    media = {
        "points": wandb.Table(columns=columns, data=[[row.get(str(key)) for key in columns] for row in flat]),
        "tokens": wandb.plot.line(table, "block", "tokens", stroke="point", title="Tokens entering each block"),
    }
    metric = accuracy(points)
    if metric is not None:
        curve = [
            [name, point["reduction"], point.get(metric.key)] for name, points in _by_policy(points) for point in points
        ]
        table = wandb.Table(columns=["policy", "reduction", metric.key], data=curve)
        title = f"{metric.name} against the share of FLOPs removed"
        media["trade_off"] = wandb.plot.line(table, "reduction", metric.key, stroke="policy", title=title)
    run.log(media)
    run.summary.update(
        {
            f"{name_of(point)}/{key}": row[key]
            for point, row in zip(points, flat, strict=True)
            for key in _curve_keys()
            if row.get(key) is not None
        }
        | _last(points)
    )
    artifact = wandb.Artifact(f"result-{run.id}", type="result")
    for file in files:
        artifact.add_file(str(file))
    run.log_artifact(artifact)
