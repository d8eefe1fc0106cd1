"""``mtr-lab demo``, or ``python -m mtr_lab.demo``: see what a policy removes from your picture."""

import argparse
from pathlib import Path

from mtr_lab.cli.help_pages import EXIT_CODES, HelpFormatter, examples, wrap
from mtr_lab.cli.program import exit_with_message
from mtr_lab.cli.signals import exit_at_signals
from mtr_lab.cli.streams import print_in_any_encoding
from mtr_lab.errors import UserError

ABOUT = """\
Serve a page: give a picture, choose policy, ratio and block, and see which tokens survive, the probabilities before \
and after, FLOPs and milliseconds. Or write one HTML file that runs vim_nano in the browser and needs no server."""
EXAMPLES = (
    "mtr-lab demo",
    "mtr-lab demo --model vim_s --port 8080",
    "mtr-lab demo --page demo.html --runtime node_modules/onnxruntime-web",
)


def main() -> None:
    """Parse the command line."""
    print_in_any_encoding()
    parser = argparse.ArgumentParser(
        prog="mtr-lab demo",
        usage="%(prog)s [OPTION ...]",
        description=wrap(ABOUT),
        epilog="\n\n".join([examples(*EXAMPLES), EXIT_CODES]),
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--model", default="vim_nano", metavar="NAME", help="model, loaded with its weights (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="port of the page (default: %(default)s)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="NAME",
        help="address to listen on (default: %(default)s, this machine only)",
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="write one HTML file instead of serving a page")
    parser.add_argument(
        "--runtime", type=Path, metavar="DIR", help="for --page: folder of the npm package onnxruntime-web"
    )
    options = parser.parse_args()
    with exit_at_signals(), exit_with_message():
        if options.page is not None:
            from mtr_lab import create_model
            from mtr_lab.demo.static_page import write_page

            runtime = options.runtime or Path("node_modules/onnxruntime-web")
            file = write_page(options.page, runtime, create_model(options.model, pretrained=True), options.model)
            print(f"wrote {file}: {file.stat().st_size / 1e6:.1f} MB, open it in a browser")
            return
        from mtr_lab.demo.gradio_page import build

        page = build(options.model)
        try:
            page.launch(server_name=options.host, server_port=options.port, share=False)
        except OSError as error:
            raise UserError(f"--host {options.host} --port {options.port}: {error}. Choose another port.") from error


if __name__ == "__main__":
    main()
