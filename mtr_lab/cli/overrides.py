"""Overrides on a command line (``KEY=VALUE``, ``+KEY=VALUE``, ``~KEY``); of mistakes in them, what to type instead."""

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from mtr_lab.errors import UserError, one_line, unknown

ALL_KEYS = "mtr-lab eval --cfg job prints all keys (so do train, bench and export)."

_OVERRIDE = re.compile(r"(\+{0,2}|~)[\w@/.]+=|~[\w@.]+$")


def is_override(argument: str) -> bool:
    """Whether an argument has the form of an override."""
    return _OVERRIDE.match(argument) is not None


def is_path(text: str) -> bool:
    """Whether there is a file or folder of this name; False for a text that no file system takes as a name."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate a command line's overrides from its options and files, wherever they stand.

    Returns:
        options and files, overrides.
    """
    overrides = [argument for argument in arguments if is_override(argument) and not is_path(argument)]
    return [argument for argument in arguments if argument not in overrides], overrides


def typed(key: str, value: str) -> str:
    """``KEY=VALUE`` as it is typed in a shell: in quotes for Hydra, where those are needed, then for the shell."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"{key}={value}")
        read = override.value()
        plain = not override.is_sweep_override() and (read == value or not isinstance(read, str))
    except HydraException:
        plain = False
    return shlex.quote(f"{key}={value if plain else _in_quotes(value)}")


def _in_quotes(value: str) -> str:
    """A text in quotes that Hydra takes off."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(value, Quote.double).with_quotes()


_FILES: tuple[tuple[tuple[str, ...], Callable[[str], str]], ...] = (
    ((".png", ".jpg", ".jpeg", ".gif", ".webp"), lambda file: f"mtr-lab visualize {shlex.quote(file)}"),
    ((".pth", ".pt", ".bin", ".safetensors"), lambda file: typed("backbone.checkpoint", file)),
    ((".ckpt",), lambda file: f"mtr-lab train {typed('training.resume', file)}"),
    ((".json",), lambda file: f"mtr-lab report {shlex.quote(file)} -o report.html"),
)
"""Suffixes of files, and what to type for such a file."""


def stray_word(word: str, before: str | None = None) -> UserError:
    """The error for an argument that is neither an option nor an override.

    Args:
        before: the argument before it.
    """
    if not word.strip():
        return UserError("an empty argument: expected KEY=VALUE. Is a variable of the shell unset?")
    key, _, beginning = (before or "").partition("=")
    if beginning and is_path(f"{beginning} {word}"):
        return UserError(f"a path with blanks needs quotes. Type {typed(key, f'{beginning} {word}')}")
    path = Path(word)
    for suffixes, instead in _FILES:
        if path.suffix.lower() in suffixes:
            return UserError(f"{word} is a file, expected KEY=VALUE. Type {instead(word)}")
    if is_path(word) and path.is_dir() and any(path.glob("**/result.json")):
        return UserError(f"{word} is a folder of results. Type mtr-lab report {shlex.quote(word)} -o report.html")
    if is_path(word) or "/" in word:
        return UserError(f"{word} is a path, expected KEY=VALUE, e.g. {typed('dataset.root', word)}")
    return UserError(f"{word!r} is not an override: expected KEY=VALUE. --help shows examples.")


def unknown_option(option: str, value: str | None, names: Sequence[str]) -> UserError:
    """The error for an option that does not exist; where it is called like a setting, says the override.

    Args:
        option: as typed, ``--ratio`` or ``--ratio=0.4``.
        value: the argument after it, if that may be its value.
        names: of all settings and groups, see ``mtr_lab.cli.settings.setting_names``.
    """
    name, equals, given = option.lstrip("-").partition("=")
    same = _same_name(name.replace("-", "_"), names)
    if not same:
        return UserError(f"unknown option {option}. --help lists the options; settings are typed KEY=VALUE.")
    value = given if equals else value
    choices = " or ".join(typed(key, value) if value is not None else f"{key}=…" for key in same)
    return UserError(f"{option} is not an option: settings are typed without dashes. Type {choices}")


def explain_composition(error: Exception, overrides: Sequence[str], names: Callable[[], Sequence[str]]) -> UserError:
    """Hydra's error about overrides in terms of what may be typed instead.

    Args:
        error: what Hydra has raised.
        overrides: the command line's.
        names: -> the names of all settings and groups.
    """
    text = str(error)
    bad = getattr(error, "override", None)
    if match := re.match(r"Ambiguous value for argument '(.*)'\n", text):
        key, _, value = match[1].partition("=")
        sweep = f"For a sweep type -m {shlex.quote(match[1])}"
        if "." not in key:
            return UserError(f"{match[1]}: a comma separates the values of a sweep. {sweep}")
        return UserError(
            f"{match[1]}: a comma separates the values of a sweep. {sweep}, for a list "
            f"{shlex.quote(f'{key}=[{value}]')}, for a text {shlex.quote(f'{key}={_in_quotes(value)}')}"
        )
    listed = [line for line in overrides if re.match(r"[a-z]+=\[", line)]
    if listed and ("is not iterable" in text or "Could not load" in text):
        key, _, value = listed[0].partition("=")
        sweep = shlex.quote(f"{key}={value.strip('[]').replace(' ', '')}")
        return UserError(f"{listed[0]}: expected one name; for several in turn type -m {sweep}")
    if match := re.search(r"Could not override '([^']*)'", text):
        name = match[1]
        value = next((given.partition("=")[2] for given in overrides if given.startswith(f"{name}=")), None)
        group = name.partition(".")[0]
        if name in names():  # with the default choices
            return UserError(f"{name}: the chosen {group} has no such setting, others in conf/{group} do. {ALL_KEYS}")
        same = _same_name(name, names())
        if same and value is not None:
            return UserError(f"unknown key {name!r}. Did you mean {' or '.join(typed(key, value) for key in same)}?")
        return unknown("key", name, names(), ALL_KEYS)
    if isinstance(bad, str):
        key, _, value = bad.partition("=")
        if value and is_override(bad) and (value[0] not in "[{(" or is_path(value)):
            return UserError(f"{bad}: a value with special characters needs quotes. Type {typed(key, value)}")
        return UserError(f"cannot parse the override {bad!r}: {getattr(error, 'message', text)}")
    packages = [line for line in overrides if "@" in line.partition("=")[0]]
    if packages and isinstance(error, AssertionError):
        return UserError(f"{packages[0]}: expected a group before the @, as in GROUP@PACKAGE=NAME.")
    given = ", ".join(overrides) if 0 < len(overrides) <= 3 else "the configuration"
    if isinstance(error, RecursionError):
        return UserError(f"{given}: maximum recursion depth exceeded. Does a value, or a file's defaults, hold itself?")
    if match := re.match(r"In '(.*)': Could not (?:find|load) '([^']*)'", text):
        return UserError(f"the defaults of {match[1]}.yaml name {match[2]}.yaml, which does not exist. Correct them.")
    problem = one_line(error) or type(error).__name__
    return UserError(problem if any(line in problem for line in overrides) else f"{given}: {problem}")


def check_numbers(overrides: Sequence[str]) -> None:
    """Raise a ``UserError`` at a number with an underscore: Hydra reads ``2024_01`` as 202401."""
    for override in overrides:
        key, _, value = override.partition("=")
        for word in re.findall(r"""'[^']*'|"[^"]*"|[^\s,:=\[\]{}()]+""", value):
            if re.fullmatch(r"[-+]?[0-9](?=.*_)[0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9_]+)?", word):
                whole = value if word == value else word
                raise UserError(
                    f"{override}: {word} would be read as {word.replace('_', '')}. Type that, or for a text "
                    f"{shlex.quote(f'{key}={_in_quotes(whole)}') if whole == value else _in_quotes(word)}"
                )


def _same_name(name: str, names: Sequence[str]) -> list[str]:
    """The setting called exactly so; else those whose last part is."""
    return [name] if name in names else [key for key in names if key.rpartition(".")[2] == name]
