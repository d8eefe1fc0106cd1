"""The ``mtr-lab`` command: one name for all programs. A program joins as one line of ``COMMANDS``."""

import os
import pkgutil
import sys
from pathlib import Path
from typing import NamedTuple

from mtr_lab import __version__
from mtr_lab.cli.help_pages import EXIT_CODES, end_quietly_without_a_reader
from mtr_lab.cli.overrides import is_override, is_path, stray_word
from mtr_lab.cli.streams import print_in_any_encoding
from mtr_lab.errors import UserError, unknown


class Command(NamedTuple):
    """``mtr-lab NAME``."""

    name: str
    program: str
    """``module:function``, called without arguments; reads ``sys.argv``."""
    summary: str


COMMANDS = (
    Command("eval", "mtr_lab.__main__:main", "measure accuracy, FLOPs and speed, unreduced and reduced"),
    Command("train", "mtr_lab.train:main", "train a classifier, a detector or a segmenter"),
    Command("bench", "mtr_lab.bench:main", "time models, policies and backends in turn"),
    Command("report", "mtr_lab.report.__main__:main", "show results on one HTML page"),
    Command("visualize", "mtr_lab.visualize:main", "draw the tokens that a policy keeps, merges and drops"),
    Command("predict", "mtr_lab.predict:main", "classify pictures with a model or an exported file"),
    Command("export", "mtr_lab.export.__main__:main", "write a reduced model as ONNX or a PyTorch program"),
    Command("demo", "mtr_lab.demo.__main__:main", "serve a page that shows which tokens a policy removes"),
    Command("models", "mtr_lab.listing:models_main", "list models: parameters, FLOPs, published top-1"),
    Command("policies", "mtr_lab.listing:policies_main", "list policies: their parts and their papers"),
)

OVERVIEW = """\
usage: mtr-lab COMMAND [ARGUMENT ...]

Token reduction for Vision Mamba without retraining.

commands:
{commands}

examples:
  mtr-lab eval                               the bundled model and images
  mtr-lab eval backbone=vim_s mtr.ratio=0.3 dataset.root=/data/imagenet
  mtr-lab eval mtr.speedup=1.5
  mtr-lab eval -m reduction=mtr,write mtr.ratio=0.2,0.4 hydra.sweep.dir=DIR
  mtr-lab report DIR -o report.html

more:
  mtr-lab COMMAND --help      show examples, groups and options of a command
  mtr-lab COMMAND --cfg job   print the settings of eval, train, bench or export
  mtr-lab --version           print the version
  mtr-lab backbone=vim_s      run eval, the default command
  python -m mtr_lab           run mtr-lab eval; -m mtr_lab.train: mtr-lab train

{exit_codes}"""


def main() -> None:
    """Run the command that the first argument names; ``eval`` if it is an option or an override."""
    print_in_any_encoding()
    arguments = sys.argv[1:]
    if arguments in ([], ["help"], ["-h"], ["--help"]):
        end_quietly_without_a_reader()
        print(overview())
        return
    if len(arguments) == 2 and arguments[0] == "help":
        arguments = [arguments[1], "--help"]
    if arguments == ["--version"]:
        print(f"mtr_lab {__version__}")
        return
    if arguments == ["-sc", "query=bash"]:
        arguments = _complete(arguments)
    try:
        command, sys.argv[1:] = split_command(arguments)
    except UserError as error:
        print(f"mtr_lab: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    pkgutil.resolve_name(command.program)()


def _complete(arguments: list[str]) -> list[str]:
    """Print the commands that may follow in the line being typed; hand the rest of the line to its command."""
    program, _, line = os.environ.get("COMP_LINE", "mtr-lab ").partition(" ")
    first, blank, rest = line.lstrip().partition(" ")
    names = [command.name for command in COMMANDS]
    if not blank:
        print(*(name for name in names if name.startswith(first)))
    elif first in names:
        os.environ["COMP_LINE"] = f"{program} {rest}"
        return [first, *arguments]
    return arguments


def split_command(arguments: list[str]) -> tuple[Command, list[str]]:
    """The command of a command line, and its arguments.

    Raises:
        UserError: the first argument is neither a command nor an option nor an override.
    """
    first = arguments[0]
    named = {command.name: command for command in COMMANDS}
    if first in named:
        return named[first], arguments[1:]
    if first.startswith("-") or is_override(first):
        return COMMANDS[0], arguments
    if is_path(first) or Path(first).suffix:
        raise stray_word(first)
    raise unknown("command", first, named)


def overview() -> str:
    """What ``mtr-lab`` prints: the commands, on one screen."""
    commands = "\n".join(f"  {command.name:<11}{command.summary}" for command in COMMANDS)
    return OVERVIEW.format(commands=commands, exit_codes=EXIT_CODES)
