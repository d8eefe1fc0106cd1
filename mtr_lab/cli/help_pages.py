"""The pages that ``--help`` prints. They need neither Hydra nor PyTorch, and fit on a screen of 80 columns."""

import argparse
import re
import signal
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mtr_lab.configuration import CONF

WIDTH = 80
EXIT_CODES = "exit codes: 0 success, 2 invalid input, 128 + n ended by signal n, 1 any other"
HYDRA_OPTIONS = """\
options:
  -m              run a sweep: all combinations of comma-separated values
  --cfg job       print every setting with its comment, and stop
  -cd DIR         add your files to the groups, e.g. DIR/reduction/NAME.yaml
  --hydra-help    print the options of Hydra
  --version       print the version"""

HelpFormatter = partial(argparse.RawDescriptionHelpFormatter, width=WIDTH, max_help_position=26)


class Program(NamedTuple):
    """A program that Hydra configures.

    Args:
        command: what the user types.
        config_name: ``conf/<config_name>.yaml`` is its configuration.
        function: ``module:function`` to call with the configuration; imported once the overrides have been checked.
        announce: configuration -> one line that says what will be done.
        about: what the program does.
        examples: arguments of the command.
        check: configuration -> None; raises a ``UserError`` before the program announces anything.
    """

    command: str
    config_name: str
    function: str
    announce: Callable[[Any], str]
    about: str
    examples: tuple[str, ...]
    check: Callable[[Any], None] | None = None


def help_page(program: Program, config_dir: Path | None = None) -> str:
    """What the program does, examples, groups, options and exit codes."""
    return "\n\n".join(
        [
            f"usage: {program.command} [OPTION ...] [GROUP=CHOICE ...] [KEY=VALUE ...]",
            wrap(program.about),
            examples(*(f"{program.command} {arguments}" for arguments in program.examples)),
            groups(program.config_name, config_dir=config_dir),
            HYDRA_OPTIONS,
            EXIT_CODES,
        ]
    )


def wrap(text: str) -> str:
    """The text in lines of the pages' width."""
    return textwrap.fill(text, WIDTH)


def examples(*lines: str) -> str:
    """The section of examples."""
    return "\n".join(["examples:", *(f"  {line}" for line in lines)])


def preset_program(file: Path) -> str | None:
    """The program that a preset in ``experiment/`` is for, ``train`` if it sets ``training``; ``None`` for any."""
    if file.parent.name != "experiment" or file.stem == "none":
        return None
    return "train" if re.search(r"^training:", file.read_text(encoding="utf-8"), re.MULTILINE) else "config"


def end_quietly_without_a_reader() -> None:
    """End a page that is piped into ``head`` as the shell expects, without a traceback."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def groups(config_name: str, names: Sequence[str] | None = None, config_dir: Path | None = None) -> str:
    """The section of the groups that a program's configuration uses, each with its choices.

    Args:
        names: of groups, by default all.
        config_dir: a folder of the user's with more files for the groups.
    """
    folders = [CONF] if config_dir is None else [CONF, config_dir]
    lines = ["groups (* is the default):"]
    defaults = re.findall(
        r"^  - (\w+)(?:@[\w.]+)?: (\w+)$", (CONF / f"{config_name}.yaml").read_text(encoding="utf-8"), re.MULTILINE
    )
    for group, default in defaults:
        if names is None or group in names:
            files = [file for folder in folders for file in (folder / group).glob("*.yaml")]
            choosable = sorted({file.stem for file in files if preset_program(file) in (None, config_name)})
            choices = " ".join(f"{name}*" if name == default else name for name in choosable)
            lines.append(textwrap.fill(choices, WIDTH, initial_indent=f"  {group:<12}", subsequent_indent=" " * 14))
    return "\n".join(lines)
