"""A configuration as YAML, with the comments of the files that it was composed from."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_omega_conf_dumper

_KEY = re.compile(r"( *)([\w@/.]+):(?: .*?)?(?:\s+(#.*))?$")


class Comment(NamedTuple):
    """The comment lines above a key, and those behind its value."""

    above: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()


def to_commented_yaml(config: DictConfig, comments: Mapping[str, Comment], resolve: bool = False) -> str:
    """The configuration as YAML, each key with its comment. Reading it gives the configuration.

    Args:
        comments: by dotted key, see :func:`read_comments`.
        resolve: replace interpolations by their values.
    """
    return "\n".join(_lines(OmegaConf.to_container(config, resolve=resolve), comments, ""))


def read_comments(config_name: str, choices: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, Comment]:
    """The comments of a program's configuration file and of the files chosen in its groups, by dotted key.

    Args:
        choices: the file chosen in each group, as in ``hydra.runtime.choices``.
        folders: of configuration files; the first that has a file is taken.
    """
    comments = _read(f"{config_name}.yaml", "", folders)
    for place, name in choices.items():
        group, _, package = place.partition("@")
        if name is not None and not group.startswith("hydra"):
            comments |= _read(f"{group}/{name}.yaml", package.removeprefix("_global_.") or group, folders)
    return comments


def _read(name: str, package: str, folders: Sequence[Path]) -> dict[str, Comment]:
    """The comments of a file on top of those of the files its defaults name beside it."""
    file = next((folder / name for folder in folders if (folder / name).exists()), None)
    if file is None:  # a plugin's
        return {}
    text = file.read_text(encoding="utf-8")
    comments: dict[str, Comment] = {}
    for base in (yaml.safe_load(text) or {}).get("defaults", []):
        if isinstance(base, str) and base != "_self_":
            comments |= _read(f"{Path(name).parent}/{base}.yaml", package, folders)
    given = re.match(r"# @package (\S+)\n", text)
    prefix = package if given is None else given[1].replace("_global_", "")
    parents: list[tuple[int, str]] = []
    above: list[str] = []
    key, header = "", True
    for line in text.splitlines():
        bare = line.strip()
        if match := _KEY.match(line):
            if header:
                comments[prefix or package] = Comment(tuple(above))
            indent = len(match[1])
            parents = [parent for parent in parents if parent[0] < indent] + [(indent, match[2])]
            key = ".".join([*([prefix] if prefix else []), *(parent for _, parent in parents)])
            comment = Comment(() if header else tuple(above), (match[3],) if match[3] else ())
            comments[key] = comment if any(comment) else comments.get(key, comment)
            above, header = [], False
        elif bare.startswith("#") and key and len(line) - len(bare) > len(parents[-1][1]) + parents[-1][0]:
            comments[key] = Comment(comments[key].above, (*comments[key].behind, bare))  # goes on below the value
        elif bare.startswith("#") and not bare.startswith("# @package"):
            above.append(bare)
    return {key: comment for key, comment in comments.items() if any(comment)}


def _lines(node: Any, comments: Mapping[str, Comment], prefix: str) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    if not prefix:
        yield from comments.get("", Comment()).above
    for key, value in node.items():
        comment = comments.get(f"{prefix}{key}", Comment())
        yield from (f"{indent}{line}" for line in comment.above)
        nested = isinstance(value, dict) and value
        line = f"{indent}{key}:" if nested else f"{indent}{key}: {_value(value)}"
        first, *others = comment.behind or ("",)
        yield f"{line}  {first}".rstrip()
        yield from (f"{' ' * (len(line) + 2)}{other}" for other in others)
        if nested:
            yield from _lines(value, comments, f"{prefix}{key}.")


def _value(value: Any) -> str:
    """A value on one line, quoted so that OmegaConf reads the same."""
    dumper = get_omega_conf_dumper()
    text: str = yaml.dump(value, Dumper=dumper, default_flow_style=True, allow_unicode=True, width=2**31)
    return text.removesuffix("\n").removesuffix("\n...")
