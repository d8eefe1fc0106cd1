"""The faults that ``mutants.py`` puts into ``mtr_lab/``: all there are in a statement, and those that a seed draws."""

import ast
import dataclasses
import hashlib
import itertools
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
OPERATORS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"), ast.Pow: ("**", "*"), ast.Lt: ("<", "<=", ">="), ast.LtE: ("<=", "<", ">"),
    ast.Gt: (">", ">=", "<="), ast.GtE: (">=", ">", "<"), ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
    ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip
AXES = {0: (1,), 1: (0, 2), 2: (1,), 3: (2,), -1: (-2,), -2: (-1,), -3: (-2,)}
TAKE_AXES = {
    "all", "amax", "amin", "any", "argmax", "argsort", "cat", "chunk", "cumsum", "expand_dims", "flatten", "flip",
    "gather", "index_select", "max", "mean", "min", "movedim", "permute", "select", "size", "softmax", "sort", "split",
    "squeeze", "stack", "sum", "topk", "transpose", "unbind", "unflatten", "unsqueeze",
}  # fmt: skip
COMMUTE = {"add", "allclose", "equal", "isclose", "isinstance", "issubclass", "max", "maximum", "min", "minimum", "mul"}
MESSAGES = {"UserError", "debug", "error", "info", "log", "print", "warn", "warning"}
SPEED = {"num_stages", "num_warps", "num_workers", "prefetch_factor", "timeout"}  # arguments that change no result


@dataclasses.dataclass(frozen=True)
class Statement:
    """A simple statement, or the head of a compound one; ``nth`` with this text in its function."""

    file: str
    function: str
    text: str
    nth: int
    node: ast.stmt = dataclasses.field(compare=False)
    last_line: int = dataclasses.field(compare=False)

    def draw(self, seed: int) -> str:
        return hashlib.sha256(repr((seed, self.file, self.function, self.text, self.nth)).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Mutant:
    """``before`` and ``after`` are the line that changes; trees are compared by all but its number."""

    file: str
    function: str
    nth: int
    kind: str
    before: str
    after: str
    line: int = dataclasses.field(compare=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.kind}\n  - {self.before.strip()}\n  + {self.after.strip()}"


def draw(tree: Path, seed: int, count: int, common: Path | None = None) -> list[tuple[Statement, Mutant]]:
    """One mutant in each of the first ``count`` statements, of those that ``common`` has as well.

    The order depends on the seed and on each statement alone, not on the others.
    """
    own = {one: one for one in statements(tree)}
    shared = own.keys() & set(statements(common)) if common else own
    drawn: list[tuple[Statement, Mutant]] = []
    for statement in (own[one] for one in sorted(shared, key=lambda one: one.draw(seed))):
        source = (tree / statement.file).read_bytes()
        if not (options := changes(statement, source)):
            continue
        choose = random.Random(statement.draw(seed)).choice
        kind = choose(sorted(options))
        start, end, new = choose(options[kind])
        mutated = source[:start] + new.encode() + source[end:]
        assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(source)), (statement, source[start:end], new)
        line = source[:start].count(b"\n")
        before, after = (text.decode().split("\n")[line] for text in (source, mutated))
        place = (statement.file, statement.function, statement.nth)
        drawn.append((statement, Mutant(*place, kind, before, after, line + 1)))
        if len(drawn) == count:
            break
    return drawn


def statements(tree: Path) -> list[Statement]:
    """Every statement of ``mtr_lab/``, file by file."""

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, ast.stmt]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                yield function, child
            if isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
                inner = f"{function}.{child.name}".lstrip(".") if isinstance(child, SCOPES) else function
                yield from walk(child, inner)

    every, seen = [], defaultdict(int)
    for path in sorted(tree.glob("mtr_lab/**/*.py")):
        file, lines = str(path.relative_to(tree)), path.read_text().split("\n")
        for function, node in walk(ast.parse(path.read_bytes()), ""):
            compound = any(isinstance(child, ast.stmt) for child in ast.iter_child_nodes(node))
            last = max([node.lineno, *(part.end_lineno for part in parts(node))]) if compound else node.end_lineno
            text = "\n".join(line.strip() for line in lines[node.lineno - 1 : last])
            every.append(Statement(file, function, text, seen[file, function, text], node, last))
            seen[file, function, text] += 1
    return every


def parts(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions of a statement that can change a result: no message, annotation, decorator, inner statement."""
    if isinstance(node, (ast.Raise, ast.JoinedStr)) or (isinstance(node, ast.Call) and name_of(node.func) in MESSAGES):
        return
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if (
                not isinstance(child, ast.AST)
                or isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case))
                or field in ("annotation", "returns", "decorator_list", "bases", "msg")
                or (isinstance(child, ast.keyword) and child.arg in SPEED)
            ):
                continue
            if isinstance(child, ast.expr):
                yield child
            yield from parts(child)


def name_of(node: ast.AST | None) -> str:
    return getattr(node, "id", None) or getattr(node, "attr", "")


def changes(statement: Statement, source: bytes) -> dict[str, list[tuple[int, int, str]]]:
    """By kind: the first byte that changes, the first after it that does not, and the text put in between."""
    lines = [0, *itertools.accumulate(len(line) + 1 for line in source.split(b"\n"))]
    found: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    axes: set[int] = set()

    def begin(node: ast.expr) -> int:
        return lines[node.lineno - 1] + node.col_offset

    def end(node: ast.expr) -> int:
        return lines[node.end_lineno - 1] + node.end_col_offset

    def text(node: ast.expr) -> str:
        return source[begin(node) : end(node)].decode()

    def operator(left: ast.expr, kind: ast.AST, right: ast.expr) -> None:
        old, *new = OPERATORS.get(type(kind), ("",))
        between = source[end(left) : begin(right)]
        if new and b"#" not in between:
            start = end(left) + between.index(old.encode())
            found["operator"] += [(start, start + len(old), other) for other in new]

    def call(node: ast.Call) -> None:
        values = [keyword.value for keyword in node.keywords if keyword.arg in ("dim", "dims", "axis")]
        if isinstance(node.func, ast.Attribute) and node.func.attr in TAKE_AXES:
            values += node.args
        for axis in (part for value in values for part in (value.elts if isinstance(value, ast.Tuple) else [value])):
            if text(axis).lstrip("-").isdigit():
                axes.update(map(id, ast.walk(axis)))
                found["axis"] += [(begin(axis), end(axis), str(other)) for other in AXES.get(int(text(axis)), ())]
        for first, second in itertools.pairwise(node.args if name_of(node.func) not in COMMUTE else []):
            between = source[end(first) : begin(second)].decode()
            alike = type(first) is type(second) and isinstance(first, (ast.Name, ast.Attribute))
            if alike and text(first) != text(second) and "\n" not in between:
                found["swap"].append((begin(first), end(second), text(second) + between + text(first)))

    def constant(node: ast.Constant) -> None:
        other: list[object] = []
        if isinstance(node.value, bool):
            other = [not node.value]
        elif isinstance(node.value, int):
            other = [node.value + 1, node.value - 1] if node.value else [1]
        elif isinstance(node.value, float):
            other = [node.value * 2 or 1.0]
        found["constant"] += [(begin(node), end(node), str(value)) for value in other]

    for node in parts(statement.node):
        if isinstance(node, ast.BinOp) and not any(map(is_text, (node.left, node.right))):
            operator(node.left, node.op, node.right)
        elif isinstance(node, ast.BoolOp):
            for left, right in itertools.pairwise(node.values):
                operator(left, node.op, right)
        elif isinstance(node, ast.Compare):
            for left, kind, right in zip([node.left, *node.comparators[:-1]], node.ops, node.comparators, strict=True):
                operator(left, kind, right)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            found["operator"].append((begin(node), begin(node) + len("not "), ""))
        elif isinstance(node, ast.Call):
            call(node)
        elif isinstance(node, ast.Constant) and id(node) not in axes:
            constant(node)
    if isinstance(statement.node, ast.AugAssign):
        operator(statement.node.target, statement.node.op, statement.node.value)
    return {kind: options for kind, options in found.items() if options}


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
