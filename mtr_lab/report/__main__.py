"""``python -m mtr_lab.report RESULTS… -o report.html``: an HTML dashboard of results."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mtr_lab.errors import UserError
from mtr_lab.report.dashboard import build
from mtr_lab.report.dashboard_live import make_server


def main(arguments: Sequence[str] | None = None) -> None:
    """Write or serve a dashboard. Exit code 0 done, 2 a mistake in what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m mtr_lab.report", description="Results as one HTML file that needs no network."
    )
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULTS", help="result.json files, run folders, or folders of them"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the HTML file to write")
    parser.add_argument("--live", action="store_true", help="serve the report on this machine and follow new results")
    parser.add_argument("--port", type=int, default=8765, help="for --live; 0 takes a free one (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.output is None and not options.live:
        parser.error("say where to write the report (-o report.html), or --live to serve it")
    try:
        if options.output is not None:
            _write(options.results, options.output)
        if options.live:
            _serve(options.results, options.port)
    except UserError as error:
        print(f"mtr_lab: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _write(results: Sequence[Path], output: Path) -> None:
    try:
        data = build(results, output)
    except OSError as error:
        raise UserError(f"cannot write the report {output}: {error.strerror}.") from error
    for note in data["notes"]:
        print(f"mtr_lab: {note}", file=sys.stderr)
    print(f"wrote {output}: {len(data['runs'])} runs, {len(data['points'])} points")


def _serve(results: Sequence[Path], port: int) -> None:
    with make_server(results, port) as server:
        print(f"http://localhost:{server.server_port} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
