"""Read a YAML file of the user's: one document of plain values, each of which is read as it is written.

YAML 1.1, which Hydra reads, takes ``1_0`` for 10, ``010`` for 8, ``1:30`` for 90 and ``no`` for false.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from mtr_lab.errors import UserError
from mtr_lab.regular_file import read_regular

_MOST = 100_000
"""Values in a file. Aliases of aliases of lists multiply them without end."""
_TAG = "tag:yaml.org,2002:"
_SURPRISING = re.compile(
    r"[-+]?(?=.*_)[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?"  # 1_0
    r"|[-+]?0[0-7]+"  # octal
    r"|[-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?"  # to the base of 60
)
_WORDS = ("yes", "no", "on", "off")


def read_yaml(file: Path) -> Any:
    """The content of a file.

    Raises:
        UserError: the file cannot be read, or is not plain YAML: a tag that makes an object, a repeated key, several
            documents, a value that YAML reads as another one. One line that names the file and, if known, its line.
    """
    try:
        text = read_regular(file).decode("utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _check(node, file, {})
        return yaml.safe_load(text)
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f", line {mark.line + 1}"
        several = error.problem == "but found another document"
        problem = "several documents. Keep one of them" if several else error.problem or error.context
        raise _not_plain(f"{file}{line}", problem) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise _not_plain(file, " ".join(str(error).split())) from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}.") from error


def surprising(text: str) -> bool:
    """Whether YAML 1.1 reads a value without quotes as a number that is written otherwise."""
    return _SURPRISING.fullmatch(text) is not None


def _not_plain(place: object, problem: object) -> UserError:
    return UserError(f"{place} is not plain YAML: {problem}.")


def _check(node: yaml.Node, file: Path, counted: dict[int, int]) -> int:
    """The number of values in a node, aliases followed; ``counted`` has those of the nodes that were checked.

    Raises:
        UserError: see :func:`read_yaml`.
    """
    if id(node) in counted:
        return counted[id(node)]
    place = f"{file}, line {node.start_mark.line + 1}"
    counted[id(node)] = _MOST  # until it is counted: a node that contains itself has no end
    number = 1
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, place)
    elif isinstance(node, yaml.SequenceNode):
        number += sum(_check(item, file, counted) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        number += sum(_check(item, file, counted) for pair in node.value for item in pair)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                place = f"{file}, line {key.start_mark.line + 1}"
                raise _not_plain(place, f"the key {key.value!r} occurs a second time. Keep one of them")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
    if number >= _MOST:
        raise _not_plain(place, f"with its aliases it has {_MOST} values or more")
    counted[id(node)] = number
    return number


def _check_scalar(node: yaml.ScalarNode, place: str) -> None:
    if node.style is not None:  # in quotes, or a block of text
        return
    word = node.tag == f"{_TAG}bool" and node.value.lower() in _WORDS
    if word or surprising(node.value):
        value = yaml.safe_load(node.value.replace("_", ""))
        raise _not_plain(
            place, f"{node.value} would be read as {str(value).lower()}. Write that, or put a text into quotes"
        )
