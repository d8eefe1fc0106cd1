"""``mtr-lab report``, or ``python -m mtr_lab.report``: results as one HTML page, a figure, or a report on W&B."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mtr_lab.cli.help_pages import EXIT_CODES, HelpFormatter, examples, wrap
from mtr_lab.cli.signals import answer, exit_at_signals
from mtr_lab.cli.streams import print_in_any_encoding, stop_printing
from mtr_lab.errors import UserError, machine_error
from mtr_lab.packages import require
from mtr_lab.report import wandb_report
from mtr_lab.report.dashboard.live import make_server
from mtr_lab.report.dashboard.page import build
from mtr_lab.report.dashboard.reader import Reader
from mtr_lab.report.figures import CHARTS, FORMATS, write_figure

WANDB = "wandb="
ABOUT = "Show results on one HTML page that needs no network: tables, charts, differences image by image."
EXAMPLES = (
    "mtr-lab report outputs",
    "mtr-lab report multirun/DATE/TIME -o figure.pdf",
    "mtr-lab report multirun/DATE/TIME -o tokens.svg --chart tokens",
    "mtr-lab report outputs multirun --live --port 0",
    "mtr-lab report outputs wandb=PROJECT",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write or serve the page. Exit code 0: done; 2: the user's mistake.

    Args:
        arguments: by default those of the command line.
    """
    print_in_any_encoding()
    parser = argparse.ArgumentParser(
        prog="mtr-lab report",
        usage="%(prog)s RESULTS ... [OPTION ...] [wandb=PROJECT]",
        description=wrap(ABOUT),
        epilog=f"{examples(*EXAMPLES)}\n\n{EXIT_CODES}",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "results",
        nargs="+",
        metavar="RESULTS",
        help="result.json files, run folders, or folders of them; wandb=PROJECT or wandb=ENTITY/PROJECT makes a "
        "report on Weights & Biases, with charts of the runs logged to that project",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write (default: report.html); with .pdf, .svg or .png, one chart as wide as a column of a paper",
    )
    parser.add_argument(
        "--chart",
        metavar="NAME",
        choices=[*CHARTS],
        help=f"chart of the figure: {', '.join(CHARTS)} (default: accuracy)",
    )
    parser.add_argument("--live", action="store_true", help="serve the page on this machine and follow new results")
    parser.add_argument(
        "--port", type=int, default=8765, metavar="N", help="port for --live; 0 takes a free one (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    projects = [given.removeprefix(WANDB) for given in options.results if given.startswith(WANDB)]
    results = [Path(given) for given in options.results if not given.startswith(WANDB)]
    if options.output is None and not options.live and not projects:
        options.output = Path("report.html")
    figure = options.output is not None and options.output.suffix.lower() in FORMATS
    if options.chart and not figure:
        parser.error(f"--chart {options.chart} is for a figure: add -o FILE.pdf, .svg or .png")
    if not results:
        parser.error("give results: result.json files, run folders, or folders of them")
    for project in projects:
        if project.count("/") > 1 or not all(map(str.strip, project.split("/"))):
            parser.error(f"{WANDB}{project} is not a project: give {WANDB}PROJECT or {WANDB}ENTITY/PROJECT")
    try:
        with exit_at_signals():
            if projects:
                require(*wandb_report.NEEDS)
            if figure:
                write_figure(results, options.output, options.chart or "accuracy")
                print(f"wrote {options.output}")
            elif options.output is not None:
                _write(results, options.output)
            for project in projects:
                _send(results, project)
            if options.live:
                _serve(results, options.port)
    except UserError as error:
        print(f"mtr_lab: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        message = machine_error(error)
        if message is None:
            raise
        stop_printing()
        print(f"mtr_lab: {message}", file=sys.stderr)
        raise SystemExit(1) from None


def _write(results: Sequence[Path], output: Path) -> None:
    data = build(results, output)
    for note in data["notes"]:
        print(f"mtr_lab: {note}", file=sys.stderr)
    print(f"wrote {output}: {len(data['runs'])} runs, {len(data['points'])} points")
    print(f"open it in a browser: {output.resolve().as_uri()}")


def _send(results: Sequence[Path], project: str) -> None:
    data = Reader(results).data()
    *entity, name = project.split("/")
    address = wandb_report.build([run["result"] for run in data["runs"]], name, entity="/".join(entity) or None)
    print(f"made {address}")


def _serve(results: Sequence[Path], port: int) -> None:
    with make_server(results, port) as server:
        print(f"http://localhost:{server.server_port} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            answer()
            print()


if __name__ == "__main__":
    main()
