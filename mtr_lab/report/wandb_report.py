"""A report on Weights & Biases: the trade-off of all policies, the table of points, and how to read them."""

from collections.abc import Mapping, Sequence
from typing import Any

from mtr_lab.errors import UserError
from mtr_lab.report.wandb_login import wandb_mode
from mtr_lab.results.predictions import point_name
from mtr_lab.results.schema import ACCURACIES, Number, Result
from mtr_lab.results.seeds import mean_point, seed_groups


def build(results: Sequence[Result], project: str, *, entity: str | None = None, title: str | None = None) -> str:
    """Create a report in a W&B project: a table of the results, and charts of the runs that were logged there.

    Args:
        results: what the table shows; the charts show the project's runs, see ``log_result``.
        project: where the runs were logged, and where the report goes.
        entity: user or team, by default the one logged in.
        title: by default the backbones and datasets.

    Returns:
        The report's address.

    Raises:
        UserError: no result, no login, ``wandb-workspaces`` is not installed, or the server refuses.
    """
    if not results:
        raise UserError("no result to report: give a result.json, or a folder that holds some.")
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise UserError("a W&B report needs an extra: pip install 'mtr-lab[workspaces]'.") from error
    if wandb_mode() != "online":
        raise UserError("a W&B report is made on the server: log in (wandb login, or WANDB_API_KEY), not offline.")
    report = wr.Report(project=project, entity=entity or "", title=title or _title(results), blocks=blocks(wr, results))
    try:
        report.save()
    except Exception as error:  # of wandb, of its HTTP client, of GraphQL: none of which share a base
        raise UserError(f"W&B did not take the report for project {project!r}: {error}") from error
    return str(report.url)


def blocks(wr: Any, results: Sequence[Result]) -> list[Any]:
    """The blocks of the report, of the module ``wandb_workspaces.reports.v2``."""
    points = [point for result in results for point in result["points"]]
    accuracy = next((name for name in ACCURACIES if any(name in point for point in points)), None)
    policies = sorted({point["policy"] for point in points if point["policy"] != "none"})
    metrics = [name for name in (accuracy, "agreement", "kl", "img_per_s") if any(name in point for point in points)]
    panels = [
        wr.LinePlot(
            title=f"{metric} against the FLOPs removed, %",
            x="trainer/global_step",  # the asked share in percent, see log_result
            y=[f"{policy}/{metric}" for policy in policies],
        )
        for metric in metrics
    ]
    return [
        wr.TableOfContents(),
        wr.H1("Results"),
        wr.MarkdownBlock(_table(results, accuracy)),
        wr.H1("Trade-off"),
        wr.PanelGrid(panels=panels),
    ]


def _title(results: Sequence[Result]) -> str:
    return ", ".join(dict.fromkeys(f"{result['backbone']} on {result['dataset']}" for result in results))


def _table(results: Sequence[Result], accuracy: str | None) -> str:
    """Markdown; the unreduced model of several runs once, runs of several seeds as their mean."""
    groups = seed_groups(results)
    means = {group[0]: mean_point(results, group) for group in groups}
    others = {place for group in groups for place in group[1:]}
    rows = dict.fromkeys(
        f"| {result['backbone']} | {result['dataset']} | {_cells(means.get((r, i), point), accuracy)} |"
        for r, result in enumerate(results)
        for i, point in enumerate(result["points"])
        if (r, i) not in others
    )
    heading = f"| backbone | dataset | point | FLOPs removed | {accuracy or '–'} | agreement | KL, nats |"
    return "\n".join([heading, "|---" * 7 + "|", *rows])


def _cells(point: Mapping[str, Any], accuracy: str | None) -> str:
    kl: Number = point.get("kl")
    shares = [point.get("reduction"), point.get(accuracy or ""), point.get("agreement")]
    name = point_name(point["policy"], point["ratio"])
    if "seeds" in point:
        name += f", mean of {len(point['seeds'])} seeds"
    cells = [name, *("–" if x is None else f"{100 * x:.1f} %" for x in shares)]
    return " | ".join([*cells, "–" if kl is None else f"{kl:.3f}"])
