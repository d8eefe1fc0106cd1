"""No turn of phrase that readers stumbled over, in comments, docstrings, messages and pages; no such variable names."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = [".github", "conf", "docs", "experiments", "mtr_lab", "notebooks", "tests"]
SUFFIXES = {".css", ".html", ".ipynb", ".js", ".md", ".py", ".toml", ".yaml", ".yml"}
RECORDS = [ROOT / "experiments" / "results", Path(__file__)]

PORTION = "axis|byte|cell|column|count|entry|folder|gflop|group|line|number|one|process|row|section"
WHOLE = (
    "block|channel|class|column|device|epoch|frame|image|key|line|model|point|policy|ratio|row|run|setting|task|value"
)
COMPARED = "more|longer|better|wider|other|less|such|later|faster|slower|worse|larger|smaller"
TURNS = {
    "who(so)?ever|whomever": "name the user, the process or the function",
    "of (its|their) own": "say 'separate', or leave it out",
    "so (many|much|few)": "give the number or the argument's name",
    "(is|was|are) known of|what is known": "name it: annotations, metadata, …",
    "what (there is|is there|is left)": "name it: the tokens that remain, …",
    "carr(y|ies|ied|ying) (it |them )?out": "'apply', 'run' or 'do'",
    "(take|takes|took|taken|taking) (it |them )in|takes in(?! order| turn)": "'absorb' or 'accept'",
    "which is twice": "say what happens twice",
    "on (its|their) way": "say when or where",
    "(come|comes|came) back": "'return'",
    "(is|are) no more(?! than)|(is|are|was|were) gone": "'removed', 'freed' or 'dead'",
    "(be|been) had": "say what fails: cannot be read, does not exist, …",
    "what (becomes|became) of": "'what happens to', or name the result",
    r"(?<!there\s)(is|are) (?-i:none)": "'is invalid', 'is not a box', …",
    rf"(?<!there\s)(is|are) no (?!{COMPARED})\w+": "'is not a …', 'are not …'",
    "an image, true": "'true FLOPs per image'",
    "in another layout": "say which layout",
    "all the same": "'still', 'too'",
    "for ever|ever after": "'in a loop', 'from then on'",
    "hardly any": "'few', or the number",
    "beside (each|one an)other": "'side by side' or 'together'",
    rf"({PORTION})s? an? ({WHOLE})": "'per': one row per block",
    "setting was chosen": "say what the images were not used for",
    "(is|are) of another": "'belongs to another …', 'has another …'",
    "names? no": "'lists no …', 'does not state …'",
    "(go|goes|going|went) on with": "'continue'",
    "(was|were) given none": "'got none'",
    "looked into": "'unwrapped', 'searched', …",
    r"another \w+ than": "'a … other than'",
    "is left out, it": "'is left out because it …'",
}
"""Regular expressions, and what to write instead."""

NAMES = {"each", "found", "gone", "inside", "there"}
"""Variables of the package are called after what they hold: ``detections``, ``mask``, ``row``."""


def _pattern(turn: str) -> re.Pattern[str]:
    return re.compile(rf"\b({turn})\b".replace(" ", r"\s+"), re.IGNORECASE)


PATTERNS = [(_pattern(turn), instead) for turn, instead in TURNS.items()]
ANY_TURN = _pattern("|".join(TURNS))  # most texts have none


def _files() -> list[Path]:
    nested = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    files = [path for path in [*sorted(ROOT.glob("*")), *nested] if path.suffix in SUFFIXES and path.is_file()]
    return [path for path in files if not any(path.is_relative_to(record) for record in RECORDS)]


def _python_prose(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of the comments and of every string; an f-string's values are left out."""
    comments = ["\0"] * (source.count("\n") + 1)  # between two comments with code in between
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0] - 1] = token.string.lstrip("# ")
    yield 1, "\n".join(comments)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def _prose(path: Path) -> Iterator[tuple[int, str]]:
    """(line of its start, text) of everything in a file that people read."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from _python_prose(source)
    elif path.suffix == ".ipynb":
        yield 1, re.sub(r'\\n",\n\s*"', "\n", source)
    else:
        yield 1, re.sub(r"(?m)^[ \t]*(#+|//|\*|>)", "", source)


def hits(path: Path) -> set[str]:
    """``file:line: 'turn': what to do``, for every banned turn in a file."""
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return {
        f"{name}:{line + text.count(chr(10), 0, match.start())}: {' '.join(match.group().split())!r}: write {instead}"
        for line, text in _prose(path)
        if ANY_TURN.search(text)
        for pattern, instead in PATTERNS
        for match in pattern.finditer(text)
    }


def test_prose_is_plain() -> None:
    wrong = sorted(hit for path in _files() for hit in hits(path))
    assert not wrong, "\n".join(["rewrite these sentences: subject, verb, object, the field's terms.", *wrong])


def test_variables_are_called_after_what_they_hold() -> None:
    wrong = []
    for path in sorted((ROOT / "mtr_lab").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "arg", None) if isinstance(node, ast.arg) else getattr(node, "id", None)
            assigned = isinstance(node, ast.arg) or isinstance(getattr(node, "ctx", None), ast.Store)
            if assigned and name in NAMES:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not wrong, "\n".join(["call these variables after what they hold:", *wrong])


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("comment.py", "x = 1\n# there for\n# ever\n", 2),
        ("docstring.py", 'def f():\n    """First.\n\n    It loops for ever.\n    """\n', 4),
        ("message.py", 'raise ValueError(\n    f"{x} runs for "\n    "ever."\n)\n', 2),
        ("page.md", "# Title\n\n* it runs for\n  ever\n", 3),
        ("settings.yaml", "a: 1  # for ever\n", 1),
        ("script.js", "const a = 1; // for\n// ever\n", 1),
        ("notebook.ipynb", '["runs for\\n",\n "ever"]\n', 1),
    ],
)
def test_banned_turns_are_seen_where_people_read(tmp_path: Path, name: str, content: str, line: int) -> None:
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    (hit,) = hits(file)
    assert hit.startswith(f"{file}:{line}: 'for ever': ")


def test_code_is_no_prose(tmp_path: Path) -> None:
    (file := tmp_path / "code.py").write_text("carry = out = all = the = same = 1\nif carry is None: out\n")
    assert not hits(file)
