"""A report on Weights & Biases: the table of points, and the trade-off of all policies."""

from collections.abc import Mapping, Sequence
from typing import Any

from mtr_lab.errors import UserError
from mtr_lab.packages import require
from mtr_lab.report.wandb_login import wandb_mode
from mtr_lab.results.metrics import accuracy, shown_metrics
from mtr_lab.results.metrics.metric import Metric
from mtr_lab.results.predictions import name_of
from mtr_lab.results.schema import Number, Result
from mtr_lab.results.seeds import mean_point, seed_groups

NEEDS = ("wandb_workspaces", "workspaces", "a W&B report")


def build(results: Sequence[Result], project: str, *, entity: str | None = None, title: str | None = None) -> str:
    """Create a report in a W&B project: a table of the results, and charts of the runs that were logged there.

    Args:
        results: for the table; the charts show the runs logged to the project, see ``log_result``.
        project: the project of these runs, which receives the report.
        entity: user or team, by default the one that is logged in.
        title: by default the backbones and datasets.

    Returns:
        The address of the report.

    Raises:
        UserError: no result, no login, ``wandb-workspaces`` is not installed, or the server refuses.
    """
    if not results:
        raise UserError("no result to report: give a result.json, or a folder that contains some.")
    require(*NEEDS)
    import wandb_workspaces.reports.v2 as wr

    if wandb_mode() != "online":
        raise UserError("a W&B report is made on the server: log in (wandb login, or WANDB_API_KEY), not offline.")
    report = wr.Report(project=project, entity=entity or "", title=title or _title(results), blocks=blocks(wr, results))
    try:
        report.save()
    except Exception as error:  # wandb, its HTTP client and GraphQL raise errors without a common base class
        raise UserError(f"W&B rejected the report for project {project!r}: {error}") from error
    return str(report.url)


def blocks(wr: Any, results: Sequence[Result]) -> list[Any]:
    """The blocks of the report; ``wr`` is the module ``wandb_workspaces.reports.v2``."""
    points = [point for result in results for point in result["points"]]
    metrics = _metrics(results)
    policies = sorted({point["policy"] for point in points if point["policy"] != "none"})
    names = {metric.key: metric.name for metric in metrics}
    if any("img_per_s" in point for point in points):
        names["img_per_s"] = "Images per second"
    panels = [
        wr.LinePlot(
            title=f"{name} against the FLOPs removed, %",
            x="trainer/global_step",  # the asked share in percent, see log_result
            y=[f"{policy}/{key}" for policy in policies],
        )
        for key, name in names.items()
    ]
    return [
        wr.TableOfContents(),
        wr.H1("Results"),
        wr.MarkdownBlock(_table(results, metrics)),
        wr.H1("Trade-off"),
        wr.PanelGrid(panels=panels),
    ]


def _title(results: Sequence[Result]) -> str:
    return ", ".join(dict.fromkeys(f"{result['backbone']} on {result['dataset']}" for result in results))


def _metrics(results: Sequence[Result]) -> list[Metric]:
    """The accuracy of the task, and the distances to the unreduced model."""
    points = [point for result in results for point in result["points"]]
    first = accuracy(points)
    return [metric for metric in shown_metrics(points) if metric.relative or metric is first]


def _table(results: Sequence[Result], metrics: Sequence[Metric]) -> str:
    """The points in Markdown: equal rows once, runs that differ only in the seed as their mean."""
    groups = seed_groups(results)
    means = {group[0]: mean_point(results, group) for group in groups}
    others = {place for group in groups for place in group[1:]}
    rows = dict.fromkeys(
        f"| {result['backbone']} | {result['dataset']} | {_cells(means.get((r, i), point), metrics)} |"
        for r, result in enumerate(results)
        for i, point in enumerate(result["points"])
        if (r, i) not in others
    )
    names = [metric.name if metric.unit == "%" else f"{metric.name}, {metric.unit}" for metric in metrics]
    columns = ["backbone", "dataset", "point", "FLOPs removed", *names]
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows])


def _cells(point: Mapping[str, Any], metrics: Sequence[Metric]) -> str:
    name = name_of(point)
    if "seeds" in point:
        name += f", mean of {len(point['seeds'])} seeds"
    figures = [(point.get("reduction"), "%"), *((point.get(metric.key), metric.unit) for metric in metrics)]
    return " | ".join([name, *(_written(value, unit) for value, unit in figures)])


def _written(value: Number, unit: str) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.3f}"
