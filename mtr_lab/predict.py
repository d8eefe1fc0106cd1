"""``mtr-lab predict``, or ``python -m mtr_lab.predict``: the classes of pictures."""

import argparse
import sys
from pathlib import Path

from mtr_lab.cli.help_pages import EXIT_CODES, HelpFormatter, examples, groups, wrap
from mtr_lab.cli.overrides import split_overrides, unknown_option
from mtr_lab.cli.program import compose, exit_with_message
from mtr_lab.cli.settings import setting_names
from mtr_lab.cli.signals import exit_at_signals
from mtr_lab.cli.streams import print_in_any_encoding
from mtr_lab.errors import UserError
from mtr_lab.export.formats import FORMATS as EXPORTED

ABOUT = """\
Classify pictures, or all pictures in folders, with a model or a file of mtr-lab export: the most probable classes \
as a table, JSON or CSV."""
EXAMPLES = (
    "mtr-lab predict dog.jpg",
    "mtr-lab predict PICTURES/ --compare mtr.ratio=0.4 --format csv",
    "mtr-lab predict dog.jpg --model vim_nano.onnx --top 1",
    "mtr-lab predict dog.jpg backbone=vim_s",
)


def main() -> None:
    """Parse the command line: files and options, and Hydra overrides wherever they stand."""
    print_in_any_encoding()
    parser = argparse.ArgumentParser(
        prog="mtr-lab predict",
        usage="%(prog)s PICTURE|FOLDER [...] [OPTION ...] [KEY=VALUE ...]",
        description=wrap(ABOUT),
        epilog="\n\n".join([examples(*EXAMPLES), groups("predict", ("backbone", "reduction")), EXIT_CODES]),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("pictures", nargs="*", type=Path, metavar="PICTURE", help="picture files, or folders of them")
    parser.add_argument("--model", type=Path, metavar="FILE", help="use a .onnx or .pt2 file instead of backbone=")
    parser.add_argument("--compare", action="store_true", help="show the unreduced model beside the reduced one")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="number of classes per picture (default: 5)")
    parser.add_argument(
        "--format", choices=("table", "json", "csv"), default="table", help="output format (default: table)"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to this file instead of printing")
    parser.add_argument(
        "--config-dir", "-cd", type=Path, metavar="DIR", help="folder with your policies, DIR/reduction/*.yaml"
    )
    arguments, overrides = split_overrides(sys.argv[1:])
    options, unknown_options = parser.parse_known_args(arguments)
    with exit_at_signals(), exit_with_message():
        if unknown_options:
            raise unknown_option(unknown_options[0], None, setting_names("predict"))
        if not options.pictures:
            raise UserError("give pictures, or folders of pictures: mtr-lab predict dog.jpg")
        for file in options.pictures:
            if file.suffix.lower() in EXPORTED.values():
                raise UserError(f"{file} is a file of mtr-lab export, not a picture: write --model {file}")
        if options.top < 1:
            raise UserError(f"--top {options.top}: expected at least 1.")
        if options.model is not None and (overrides or options.compare):
            given = overrides[0] if overrides else "--compare"
            raise UserError(f"--model {options.model} contains its model, policy and ratio: leave {given} out.")
        config = compose("predict", overrides, options.config_dir)
        # PyTorch is imported once the overrides have been checked.
        from mtr_lab.export.prediction import (
            FORMATS,
            classify,
            configured_classifiers,
            exported_classifier,
            files_below,
        )
        from mtr_lab.results.atomic import check_output, write_output

        if options.output is not None:
            check_output(options.output)
        files = files_below(options.pictures)
        if options.model is not None:
            classifiers = [exported_classifier(options.model)]
        else:
            classifiers = configured_classifiers(config, options.compare)
        text = FORMATS[options.format](list(classify(classifiers, files, options.top)))
        if options.output is None:
            print(text)
            return
        write_output(options.output, f"{text}\n".encode(errors="surrogateescape"))
        print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
