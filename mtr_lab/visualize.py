"""``python -m mtr_lab.visualize``: pictures of the tokens that a policy keeps, merges and drops."""

import argparse
import sys
from pathlib import Path

from mtr_lab.cli import compose, exit_on_user_error, print_on_rank_zero, split_overrides

DEFAULT_POLICIES = ("mtr", "write", "hsa", "random")


def main() -> None:
    """Parse the command line: files and options, and Hydra overrides wherever they stand."""
    parser = argparse.ArgumentParser(
        prog="python -m mtr_lab.visualize",
        usage="%(prog)s [IMAGE|CLIP ...] [--blocks N ...] [--policies NAME ...] [-o DIR] [-cd DIR] [KEY=VALUE ...]",
        description="Draw which tokens a policy keeps, merges and drops, and the scores by which it chose: for each "
        "image IMAGE_POLICY.png (chosen blocks), IMAGE_POLICY.gif (through the depth) and IMAGE_policies.png (several "
        "policies at the same FLOPs). A CLIP is an animated GIF or a folder of frames, for a model of videos "
        "(backbone=videomamba_ti backbone.num_frames=8): CLIP_POLICY.png (frames and chosen blocks), CLIP_POLICY.gif "
        "(through the frames, after the last of the blocks) and CLIP_policies.png.",
        epilog="KEY=VALUE: any setting of python -m mtr_lab, e.g. backbone=vim_s reduction=hsa mtr.ratio=0.4; of "
        "several ratios, the highest is drawn.",
    )
    parser.add_argument(
        "images", nargs="*", type=Path, metavar="IMAGE", help="image files, by default bundled ones; or clips"
    )
    parser.add_argument(
        "--blocks", nargs="+", type=int, metavar="N", help="counted from 0; by default four that reduce"
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        metavar="NAME",
        help=f"to compare; by default the chosen one and {', '.join(DEFAULT_POLICIES)}",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("pictures"), metavar="DIR", help="default: pictures")
    parser.add_argument(
        "--config-dir", "-cd", type=Path, metavar="DIR", help="your own files for the groups: DIR/reduction/NAME.yaml"
    )
    arguments, overrides = split_overrides(sys.argv[1:])
    options = parser.parse_args(arguments)
    swallowed = [name for name in options.policies or () if Path(name).exists()]
    if swallowed:
        parser.error(f"{swallowed[0]} is taken for a policy: give the images before --policies")
    with exit_on_user_error():
        config = compose("config", overrides, options.config_dir)
        chosen = config.mtr.policy
        compared = list(dict.fromkeys(options.policies or (chosen, *DEFAULT_POLICIES)))
        what = f"{config.backbone.name} under {chosen} at mtr.ratio={config.mtr.ratio}"
        print_on_rank_zero(f"drawing {what}, compared: {', '.join(compared)}; writing to {options.output}")
        policies = {
            name: compose("config", [*overrides, f"reduction={name}"], options.config_dir).mtr
            for name in {chosen, *compared}
        }
        # PyTorch is imported once the overrides have been checked.
        from mtr_lab.visualization import visualize

        for file in visualize(config, policies, compared, options.images, options.output, options.blocks):
            print(f"wrote {file}")


if __name__ == "__main__":
    main()
