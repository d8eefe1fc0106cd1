"""Mutation tests: one small fault at a time is put into ``mtr_lab/``, and the tests that cover it have to fail.

    python tests/mutants.py record RECORD              # run every test once: which lines it covers, its time and lane
    python tests/mutants.py list                       # print the mutants
    python tests/mutants.py run RECORD OUT.json        # put each in, run the tests that cover it, fast ones first
    python tests/mutants.py compare BEFORE.json AFTER.json

Needs pytest-cov beside the test extra. The mutants depend on ``--seed`` and on the code alone: one a statement,
statements in an order drawn by the seed, the first ``--count`` of them. To compare two versions of the tests:

* ``record`` and ``run`` on the older tree, ``--tree OLD``, with half as many mutants again as are wanted;
* ``record`` and ``run --common OLD`` on the newer tree: the same mutants in the same order, less the statements that
  the older tree lacks; ``compare`` then pairs them and lists whatever is no longer caught.

A run takes the tests of the fast lane (``-m "not slow"``) first, so that it also says what that lane alone catches;
``--lane fast`` leaves out the others. A mutant counts as caught if a test fails, or exceeds its time limit, that passes
in the same setting without it. Each mutant has a temporary copy of the tree. Its tests run in a fork of a process that
has imported PyTorch and the like, but nothing of ``mtr_lab``.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRELOADED = ("torch", "torch._dynamo", "torchvision", "timm", "lightning", "torchmetrics", "numba", "hydra", "wandb")
BUDGET = 120  # recorded seconds of tests that a mutant has to survive in each lane
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

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
TALK = {"UserError", "debug", "error", "info", "log", "print", "warn", "warning", "warn_once"}
SPEED = {"num_stages", "num_warps", "num_workers", "prefetch_factor", "timeout"}  # arguments that change no result


@dataclasses.dataclass(frozen=True)
class Statement:
    """A simple statement or the head of a compound one; ``nth`` of this text in its function."""

    file: str
    function: str
    text: str
    nth: int
    node: ast.stmt = dataclasses.field(compare=False)
    last: int = dataclasses.field(compare=False)

    def draw(self, seed: int) -> str:
        return hashlib.sha256(repr((seed, self.file, self.function, self.text, self.nth)).encode()).hexdigest()


@dataclasses.dataclass
class Mutant:
    file: str
    function: str
    nth: int
    line: int
    column: int
    kind: str
    before: str  # the line
    after: str

    def key(self) -> tuple[object, ...]:
        return self.file, self.function, self.nth, self.before.strip(), self.after.strip()


def parts(node: ast.AST) -> Iterator[ast.expr]:
    """All expressions of a statement that can change a result: no message, annotation, decorator or inner statement."""
    if isinstance(node, (ast.Raise, ast.JoinedStr)) or (isinstance(node, ast.Call) and name_of(node.func) in TALK):
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases", "msg"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)) or not isinstance(child, ast.AST):
                continue
            if isinstance(child, ast.keyword) and child.arg in SPEED:
                continue
            if isinstance(child, ast.expr) and not isinstance(child, ast.JoinedStr):
                yield child
            yield from parts(child)


def name_of(node: ast.AST) -> str:
    return getattr(node, "id", None) or getattr(node, "attr", "")


def statements(tree: Path) -> list[Statement]:
    """Every statement of ``mtr_lab/`` in the order of the files."""

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, ast.stmt]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                yield function, child
            if isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
                inner = f"{function}.{child.name}".lstrip(".") if isinstance(child, FUNCTIONS) else function
                yield from walk(child, inner)

    every, seen = [], defaultdict(int)
    for path in sorted(tree.glob("mtr_lab/**/*.py")):
        file, lines = str(path.relative_to(tree)), path.read_text().splitlines()
        for function, node in walk(ast.parse(path.read_bytes()), ""):
            compound = any(isinstance(child, ast.stmt) for child in ast.iter_child_nodes(node))
            heads = [part.end_lineno for part in parts(node)]
            last = max([node.lineno, *heads]) if compound else node.end_lineno
            text = "\n".join(line.strip() for line in lines[node.lineno - 1 : last])
            every.append(Statement(file, function, text, seen[file, function, text], node, last))
            seen[file, function, text] += 1
    return every


def changes(statement: Statement, source: bytes) -> dict[str, list[tuple[int, int, str]]]:
    """By kind: what can be changed in a statement, each as the first and last byte in the file and the new text."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    axes = set()

    def begin(node: ast.expr) -> int:
        return starts[node.lineno - 1] + node.col_offset

    def end(node: ast.expr) -> int:
        return starts[node.end_lineno - 1] + node.end_col_offset

    def operator(left: ast.expr, op: ast.AST, right: ast.expr) -> None:
        old, *new = OPERATORS.get(type(op), ("",))
        gap = source[end(left) : begin(right)]
        if new and b"#" not in gap:
            at = end(left) + gap.index(old.encode())
            found["operator"] += [(at, at + len(old), text) for text in new]

    for node in parts(statement.node):
        if isinstance(node, ast.BinOp):
            if not any(isinstance(part, ast.JoinedStr) or isinstance(getattr(part, "value", None), str)
                       for part in (node.left, node.right)):  # fmt: skip
                operator(node.left, node.op, node.right)
        elif isinstance(node, ast.BoolOp):
            for left, right in itertools.pairwise(node.values):
                operator(left, node.op, right)
        elif isinstance(node, ast.Compare):
            for left, op, right in zip([node.left, *node.comparators[:-1]], node.ops, node.comparators, strict=True):
                operator(left, op, right)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            found["operator"].append((begin(node), begin(node) + len("not "), ""))
        elif isinstance(node, ast.Call):
            named = [keyword.value for keyword in node.keywords if keyword.arg in ("dim", "dims", "axis")]
            takes = isinstance(node.func, ast.Attribute) and node.func.attr in TAKE_AXES
            for axis in (part for value in (node.args if takes else []) + named for part in
                         (value.elts if isinstance(value, ast.Tuple) else [value])):  # fmt: skip
                text = source[begin(axis) : end(axis)].decode()
                if text.lstrip("-").isdigit():
                    axes.update(map(id, ast.walk(axis)))
                    found["axis"] += [(begin(axis), end(axis), str(new)) for new in AXES.get(int(text), ())]
            for first, second in itertools.pairwise(node.args):
                if type(first) is type(second) and isinstance(first, (ast.Name, ast.Attribute)):
                    texts = [source[begin(part) : end(part)].decode() for part in (first, second)]
                    between = source[end(first) : begin(second)].decode()
                    if texts[0] != texts[1] and "\n" not in between and name_of(node.func) not in COMMUTE:
                        found["swap"].append((begin(first), end(second), texts[1] + between + texts[0]))
        elif isinstance(node, ast.Constant) and id(node) not in axes:
            new: list[object] = []
            if isinstance(node.value, bool):
                new = [not node.value]
            elif isinstance(node.value, int):
                new = [node.value + 1, node.value - 1] if node.value else [1]
            elif isinstance(node.value, float):
                new = [node.value * 2 or 1.0]
            found["constant"] += [(begin(node), end(node), str(value)) for value in new]
    if isinstance(statement.node, ast.AugAssign):
        operator(statement.node.target, statement.node.op, statement.node.value)
    return {kind: options for kind, options in found.items() if options}


def mutants(tree: Path, seed: int, count: int, common: Path | None) -> list[tuple[Statement, Mutant]]:
    every = statements(tree)
    shared = set(statements(common)) if common else set(every)
    chosen: list[tuple[Statement, Mutant]] = []
    for statement in sorted(every, key=lambda one: one.draw(seed)):
        source = (tree / statement.file).read_bytes()
        options = changes(statement, source) if statement in shared else {}
        if not options or len(chosen) == count:
            continue
        draw = random.Random(statement.draw(seed))
        kind = draw.choice(sorted(options))
        start, end, new = draw.choice(options[kind])
        mutated = source[:start] + new.encode() + source[end:]
        if ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(source)):
            raise AssertionError(f"{statement.file}: {source[start:end]!r} -> {new!r} changes nothing")
        line = source[:start].count(b"\n")
        column = start - source.rfind(b"\n", 0, start) - 1
        before, after = (text.decode().splitlines()[line] for text in (source, mutated))
        name = Mutant(statement.file, statement.function, statement.nth, line + 1, column, kind, before, after)
        chosen.append((statement, name))
    return chosen


def record(tree: Path, folder: Path, workers: int) -> None:
    """Run the tests once under coverage with a context each; ``tests.json`` says their seconds and whether slow."""
    tests: dict[str, list] = defaultdict(lambda: [0.0, False])

    class Reports:
        @staticmethod
        def pytest_runtest_logreport(report: pytest.TestReport) -> None:
            tests[report.nodeid][0] += report.duration
            tests[report.nodeid][1] = "slow" in report.keywords

    folder.mkdir(parents=True)
    os.environ["COVERAGE_FILE"] = str(folder.resolve() / "coverage")
    enter(tree)
    options = ["--cov=mtr_lab", "--cov-context=test", "--cov-report=", "-p", "no:cacheprovider", "-q"]
    code = pytest.main([*options, f"-n{workers}", "tests"], plugins=[Reports()])
    described = {"commit": commit(tree), "passed": code == 0, "tests": tests}
    (folder / "tests.json").write_text(json.dumps(described, indent=0))


def enter(tree: Path) -> None:
    """Make this process and those it starts import ``mtr_lab`` and the tests of ``tree``."""
    sys.path[:] = [str(tree), *(path for path in sys.path if not Path(path or ".").resolve().is_relative_to(ROOT))]
    os.environ["PYTHONPATH"] = str(tree)
    os.chdir(tree)


def commit(tree: Path) -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True).stdout.strip()


class Coverage:
    """Which tests run a statement, by the record of its tree."""

    def __init__(self, folder: Path, tree: Path) -> None:
        from coverage import CoverageData

        data = CoverageData(str(folder / "coverage"))
        data.read()
        self.lines = {}
        for path in data.measured_files():
            file = "mtr_lab/" + path.rpartition("/mtr_lab/")[2]
            self.lines[file] = {
                line: {context.rpartition("|")[0] for context in contexts if context}
                for line, contexts in data.contexts_by_lineno(path).items()
            }
        self.tests = json.loads((folder / "tests.json").read_text())["tests"]
        self.statements = statements(tree)
        self.mentions = defaultdict(list)
        for one in self.statements:
            for name in {name_of(part) for part in parts(one.node)}:
                self.mentions[name].append(one)

    def of(self, statement: Statement) -> list[str]:
        """The tests that run it, else those that run what mentions its function or name, else what is in its file."""
        front, seen = [statement], set()
        if isinstance(statement.node, FUNCTIONS):  # a default value
            inner = f"{statement.function}.{statement.node.name}".lstrip(".")
            front = [one for one in self.statements if (one.file, one.function) == (statement.file, inner)]
        while front:
            if tests := self.run_by(front):
                return self.chosen(tests)
            seen.update(front)
            names = set()
            for one in front:
                targets = getattr(one.node, "targets", [getattr(one.node, "target", None)])
                names |= {one.function.rpartition(".")[2]} if one.function else {name_of(target) for target in targets}
            front = [one for name in names - {""} for one in self.mentions[name] if one not in seen]
        return self.chosen(self.run_by([one for one in self.statements if one.file == statement.file]))

    def run_by(self, those: list[Statement]) -> set[str]:
        """Statements outside functions do not count: they run in the test that happens to import the file first."""
        tests: set[str] = set()
        for one in those:
            lines = self.lines.get(one.file, {})
            if one.function and not isinstance(one.node, FUNCTIONS):
                tests = tests.union(*(lines.get(line, ()) for line in range(one.node.lineno, one.last + 1)))
        return tests & self.tests.keys()

    def chosen(self, tests: set[str]) -> list[str]:
        """The fast lane first, the quickest first, until the budget of a lane is spent."""
        spent, chosen = [0.0, 0.0], []
        for test in sorted(tests, key=lambda test: (self.tests[test][1], self.tests[test][0], test)):
            seconds, slow = self.tests[test]
            if spent[slow] <= BUDGET:
                chosen.append(test)
            spent[slow] += seconds
        return chosen


class Chosen:
    """Plugin of a run: these tests in this order, each within its time; the first failure is written down."""

    def __init__(self, seconds: dict[str, float], failure: Path) -> None:
        self.seconds, self.failure = seconds, failure

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        order = {test: place for place, test in enumerate(self.seconds)}
        items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])
        for item in items:
            item.add_marker(pytest.mark.timeout(60 + 10 * self.seconds[item.nodeid]), append=False)

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed and not self.failure.exists():
            crash = getattr(report.longrepr, "reprcrash", None)
            why = (crash.message if crash else str(report.longrepr).strip()).splitlines()
            self.failure.write_text(json.dumps([report.nodeid, why[0 if crash else -1].strip()[:120]]))

    pytest_collectreport = pytest_runtest_logreport


def tests_fail(tree: Path, seconds: dict[str, float]) -> list[str] | None:
    """The first test that fails in a fork of this process, and why; ``None`` if all pass."""
    failure = tree.parent / "failure"
    failure.unlink(missing_ok=True)
    files = sorted({test.partition("::")[0] for test in seconds})
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={tree.parent / 'tmp'}"]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            output = os.open(tree.parent / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(output, stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            enter(tree)
            code = int(pytest.main([*options, *files], plugins=[Chosen(seconds, failure)]))
        finally:
            os._exit(code)
    end = time.monotonic() + 120 + 5 * sum(seconds.values())
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # also what the tests left behind
    if done == (0, 0):
        os.waitpid(child, 0)
        return ["", "Timeout"]
    if failure.exists():
        return json.loads(failure.read_text())
    code = os.waitstatus_to_exitcode(done[1])
    if code in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        return None
    return ["", f"exit status {code}"]  # a crash


def trial(tree: Path, mutant: Mutant, tests: dict[str, float]) -> tuple[list[str] | None, list[str], float]:
    """What catches the mutant, tests that fail without it as well, and the seconds taken."""
    start, unsound = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="mutant", ignore_cleanup_errors=True) as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(tree, copy, symlinks=True)
        path = copy / mutant.file
        source = path.read_bytes()
        lines = source.decode().splitlines(keepends=True)
        lines[mutant.line - 1] = mutant.after + "\n"
        while True:
            tests = {test: seconds for test, seconds in tests.items() if test not in unsound}
            path.write_text("".join(lines))
            caught = tests_fail(copy, tests) if tests else None
            if caught is None or not caught[0]:
                break
            path.write_bytes(source)
            if tests_fail(copy, {caught[0]: tests.get(caught[0], 1)}) is None:
                break
            unsound.append(caught[0])
    return caught, unsound, time.monotonic() - start


def run(tree: Path, folder: Path, out: Path, sample: list[tuple[Statement, Mutant]], lane: str, jobs: int) -> dict:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as tests/conftest.py, which comes too late
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in PRELOADED:
        importlib.import_module(name)
    covering = Coverage(folder, tree)
    plan, results = {}, []
    fork = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=fork) as pool:
        for statement, mutant in sample:
            tests = [test for test in covering.of(statement) if lane == "all" or not covering.tests[test][1]]
            plan[pool.submit(trial, tree, mutant, {test: covering.tests[test][0] for test in tests})] = mutant, tests
        for future in concurrent.futures.as_completed(plan):
            (mutant, tests), (caught, unsound, seconds) = plan[future], future.result()
            result = dataclasses.asdict(mutant) | {"tests": len(tests), "seconds": round(seconds, 1)}
            result["result"] = "caught" if caught else "survived" if tests else "not covered"
            if caught:
                test, why = caught
                result |= {"test": test, "slow": bool(test) and covering.tests.get(test, [0, False])[1], "why": why}
            if unsound:
                result["fail_without"] = unsound
            results.append(result)
            print(f"{len(results)}/{len(plan)} {result['result']} in {seconds:.0f} s:", describe(mutant), flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numba", "triton", "pytest")}
    order = {mutant.key(): place for place, (_, mutant) in enumerate(sample)}
    results.sort(key=lambda result: order[key(result)])
    return {"commit": commit(tree), "lane": lane, "python": sys.version.split()[0], **versions, "mutants": results}


def key(result: dict) -> tuple[object, ...]:
    return Mutant(**{field.name: result[field.name] for field in dataclasses.fields(Mutant)}).key()


def describe(mutant: Mutant) -> str:
    return f"{mutant.file}:{mutant.line} {mutant.kind}\n  - {mutant.before.strip()}\n  + {mutant.after.strip()}"


def compare(before: Path, after: Path) -> None:
    first, second = ({key(one): one for one in json.loads(path.read_text())["mutants"]} for path in (before, after))
    both = [(first[name], second[name]) for name in first if name in second]
    for place, label in enumerate(("before", "after")):
        caught = [pair[place] for pair in both if pair[place]["result"] == "caught"]
        fast = sum(not one["slow"] for one in caught)
        print(f"{label}: {len(caught)} of {len(both)} caught, {fast} by the fast lane alone")
    for old, new in both:
        if (old["result"] == "caught") != (new["result"] == "caught"):
            print(f"{old['result']} -> {new['result']}: {new['file']}:{new['line']}\n  - {new['before'].strip()}")
            print(f"  + {new['after'].strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("record", "list", "run", "compare"))
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--tree", type=Path, default=ROOT)
    parser.add_argument("--common", type=Path, help="another tree: only statements that it has, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--lane", choices=("fast", "all"), default="all")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    tree, paths = options.tree.resolve(), [path.resolve() for path in options.paths]
    if options.command == "record":
        record(tree, *paths, workers=options.jobs)
    elif options.command == "compare":
        compare(*paths)
    else:
        sample = mutants(tree, options.seed, options.count, options.common)
        if options.command == "list":
            print(*(describe(mutant) for _, mutant in sample), sep="\n")
        else:
            folder, out = paths
            log = {"seed": options.seed} | run(tree, folder, out, sample, options.lane, options.jobs)
            out.write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
