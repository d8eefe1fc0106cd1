"""List the models and policies that can be chosen by name; ``mtr-lab models`` and ``mtr-lab policies`` print tables."""

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

from mtr_lab.cli.help_pages import EXIT_CODES, HelpFormatter, end_quietly_without_a_reader, examples, wrap
from mtr_lab.errors import UserError, unknown
from mtr_lab.policy_files import policy_files, read_policy

_ARXIV = re.compile(r"arXiv[ :](\d{4}\.\d{5})")


def list_models(pattern: str = "*") -> list[str]:
    """Names that ``create_model`` takes, by family and size.

    Args:
        pattern: a shell pattern, as of ``timm.list_models``: ``"vim_*"``.
    """
    from mtr_lab.backbones import MODELS

    return [name for name in MODELS if fnmatchcase(name, pattern)]


def list_policies(pattern: str = "*") -> list[str]:
    """Names of policies that ``patch`` takes, in alphabetical order.

    Args:
        pattern: a shell pattern: ``"*mtr*"``.
    """
    return [name for name in policy_files() if fnmatchcase(name, pattern)]


def model_table(pattern: str = "*") -> list[tuple[str, ...]]:
    """A row of texts for each model below a row of titles. Models are built without memory and without weights."""
    import torch

    from mtr_lab.backbones import FAMILIES, create_model
    from mtr_lab.measure.flops import model_costs

    registered = {name: config for family in FAMILIES for name, config in family.CONFIGS.items()}
    titles = "model", "params", "image", "GFLOPs", "GFLOPs*", "stated", "top-1", "verified", "licence", "weights"
    rows: list[tuple[str, ...]] = [titles]
    for name in list_models(pattern):
        with torch.device("meta"):
            model = create_model(name)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        costs, _ = model_costs(model)
        config = registered[name]
        top1, stated = config["published_top1"], config["published_gflops"]
        rows.append(
            (
                name,
                f"{parameters / 1e6:.1f}M",
                f"{config['input_size'][-1]}²",
                f"{costs.flops / 1e9:.2f}",
                f"{costs.literature / 1e9:.2f}",
                "–" if stated is None else f"{stated:.1f}",
                "–" if top1 is None else f"{100 * top1:.1f}%",
                config["verified"],
                config["license"],
                config.get("hf_hub_id") or _site(config.get("url")) or ("bundled" if config.get("file") else "–"),
            )
        )
    return rows


def _site(url: str | None) -> str | None:
    """The host and the repository of an address: github.com/OWNER/REPOSITORY."""
    return None if url is None else "/".join(url.split("/")[2:5])


def policy_table(pattern: str = "*", config_dir: Path | None = None) -> list[tuple[str, ...]]:
    """A row of texts for each policy below a row of titles.

    Args:
        config_dir: a folder of the user's with more policies, ``reduction/NAME.yaml``.

    Raises:
        UserError: a file of the user's is not a policy.
    """
    parts = ("score", "grouping", "matching", "merge", "order")
    rows: list[tuple[str, ...]] = [("policy", *parts, "source")]
    for name, file in policy_files([] if config_dir is None else [config_dir]).items():
        if fnmatchcase(name, pattern):
            settings = read_policy(file)
            rows.append((name, *(str(settings[part]) for part in parts), _source(file)))
    return rows


def _source(file: Path) -> str:
    """The word before the colon with which the comment of a policy's file begins; else the first arXiv number in it."""
    comment = " ".join(re.findall(r"^# (?!@package)(.*)", file.read_text(encoding="utf-8"), re.MULTILINE))
    if author := re.match(r"(\w{1,16}):", comment):
        return author[1]
    paper = _ARXIV.search(comment)
    return paper[1] if paper else "–"


def models_main() -> None:
    """``mtr-lab models``."""
    parser = _parser(
        "mtr-lab models",
        "List the models that create_model and backbone= take, without loading weights.",
        ("", "'vim_*'", "vim_s"),
    )
    options = parser.parse_args()
    spare = "stated", "verified", "weights"
    left_out = _print(model_table(options.pattern), "model", options.pattern, list_models(), spare)
    print()
    _print_notes(
        *([f"left out for want of room: {', '.join(left_out)}"] if left_out else []),
        "GFLOPs: 2 per multiply-accumulate, all scan directions; GFLOPs*: as papers count; stated: by the authors.",
        "top-1: on ImageNet-1k, as published with the weights; not measured here.",
        "verified: outputs equal the authors' with random weights (outputs), or weights were trained here (weights).",
        "licence: of the weights, as their authors state it.",
    )


def policies_main() -> None:
    """``mtr-lab policies``."""
    parser = _parser(
        "mtr-lab policies",
        "List the policies that patch and reduction= take: their parts, and the paper they follow.",
        ("", "'*r*'", "-cd DIR"),
    )
    parser.add_argument(
        "--config-dir", "-cd", type=Path, metavar="DIR", help="also list your policies, DIR/reduction/*.yaml"
    )
    options = parser.parse_args()
    try:
        rows = policy_table(options.pattern, options.config_dir)
    except UserError as error:
        _exit(error)
    _print(rows, "policy", options.pattern, list_policies())
    print("\nsource: the paper on arXiv, or the name in the policy's file.")
    print("All parts of a policy: mtr-lab eval reduction=NAME --cfg job -p mtr")


def _parser(command: str, about: str, arguments: Sequence[str]) -> argparse.ArgumentParser:
    lines = examples(*(f"{command} {given}".rstrip() for given in arguments))
    parser = argparse.ArgumentParser(
        prog=command, description=wrap(about), epilog=f"{lines}\n\n{EXIT_CODES}", formatter_class=HelpFormatter
    )
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="pattern of names, with * and ?")
    return parser


def _print(
    rows: Sequence[Sequence[str]], kind: str, pattern: str, known: Sequence[str], spare: Sequence[str] = ()
) -> list[str]:
    """Print rows of texts in columns; end with code 2 if there is none below the titles.

    Args:
        spare: titles of columns that a terminal goes without, in this order, until the others fit.

    Returns:
        The titles of the columns that are left out.
    """
    if len(rows) == 1:
        _exit(unknown(kind, pattern, known))
    end_quietly_without_a_reader()
    columns, left_out = list(zip(*rows, strict=True)), []
    widths = [max(map(len, column)) for column in columns]
    for title in spare:
        if sys.stdout.isatty() and sum(widths) + 2 * (len(widths) - 1) > _room():
            place = [column[0] for column in columns].index(title)
            del columns[place], widths[place]
            left_out.append(title)
    for row in zip(*columns, strict=True):
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return left_out


def _print_notes(*notes: str) -> None:
    """Print lines, broken where a terminal has no room for them."""
    for note in notes:
        print(textwrap.fill(note, _room(), subsequent_indent="  ") if sys.stdout.isatty() else note)


def _room() -> int:
    return shutil.get_terminal_size().columns


def _exit(error: UserError) -> NoReturn:
    print(f"mtr_lab: {error}", file=sys.stderr)
    raise SystemExit(2)
