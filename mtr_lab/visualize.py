"""``mtr-lab visualize``, or ``python -m mtr_lab.visualize``: draw the tokens that a policy keeps, merges and drops."""

import argparse
import os
import sys
from pathlib import Path

from mtr_lab.cli.help_pages import EXIT_CODES, HelpFormatter, examples, groups, wrap
from mtr_lab.cli.overrides import split_overrides, unknown_option
from mtr_lab.cli.program import compose, exit_with_message, print_on_rank_zero
from mtr_lab.cli.settings import setting_names
from mtr_lab.cli.signals import exit_at_signals
from mtr_lab.cli.streams import print_in_any_encoding

DEFAULT_POLICIES = ("fovea", "mtr", "write", "random")
ABOUT = """\
Draw which tokens a policy keeps, merges and drops, and the scores behind it, into the folder pictures: \
IMAGE_POLICY.png and .svg (some blocks), IMAGE_POLICY.gif (all blocks in turn), IMAGE_policies.png and .svg (several \
policies at the same FLOPs). A model of videos (backbone.num_frames=8) takes clips: animated GIFs or folders of \
frames."""
EXAMPLES = (
    "mtr-lab visualize",
    "mtr-lab visualize dog.jpg --policies mtr write mtr.ratio=0.4",
    "mtr-lab visualize dog.jpg --blocks 5 11 backbone=vim_s reduction=hsa",
)


def main() -> None:
    """Parse the command line: files and options, and Hydra overrides wherever they stand."""
    print_in_any_encoding()
    parser = argparse.ArgumentParser(
        prog="mtr-lab visualize",
        usage="%(prog)s [IMAGE ...] [OPTION ...] [KEY=VALUE ...]",
        description=wrap(ABOUT),
        epilog="\n\n".join([examples(*EXAMPLES), groups("config", ("backbone", "reduction")), EXIT_CODES]),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="image files (default: bundled images)")
    parser.add_argument(
        "--blocks", nargs="+", type=int, metavar="N", help="blocks to draw, from 0 (default: four that remove tokens)"
    )
    compared = f"policies to compare (default: the chosen one and {', '.join(DEFAULT_POLICIES)})"
    parser.add_argument("--policies", nargs="+", metavar="NAME", help=compared)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("pictures"),
        metavar="DIR",
        help="folder to write to (default: pictures)",
    )
    parser.add_argument(
        "--config-dir", "-cd", type=Path, metavar="DIR", help="folder with your policies, DIR/reduction/NAME.yaml"
    )
    arguments, overrides = split_overrides(sys.argv[1:])
    options, unknown_options = parser.parse_known_args(arguments)
    swallowed = [name for name in options.policies or () if os.path.exists(name)]
    if swallowed:
        parser.error(f"{swallowed[0]} is taken for a policy: give the images before --policies")
    with exit_at_signals(), exit_with_message():
        if unknown_options:
            raise unknown_option(unknown_options[0], None, setting_names("config"))
        config = compose("config", overrides, options.config_dir)
        chosen = config.mtr.policy
        names = list(dict.fromkeys(options.policies or (chosen, *DEFAULT_POLICIES)))
        what = f"{config.backbone.name} under {chosen} at mtr.ratio={config.mtr.ratio}"
        print_on_rank_zero(f"drawing {what}, compared: {', '.join(names)}; writing to {options.output}")
        policies = {
            name: compose("config", [*overrides, f"reduction={name}"], options.config_dir).mtr
            for name in {chosen, *names}
        }
        # PyTorch is imported once the overrides have been checked.
        from mtr_lab.visualization import visualize

        for file in visualize(config, policies, names, options.images, options.output, options.blocks):
            print(f"wrote {file}")


if __name__ == "__main__":
    main()
