"""Mutation tests: put one small fault at a time into ``mtr_lab/``; the tests that cover it have to fail.

    python tests/mutants.py record RECORD              # run every test once: the lines it covers, its time, its lane
    python tests/mutants.py list                       # print the mutants
    python tests/mutants.py run RECORD OUT.json        # put in one after another, run the tests that cover it
    python tests/mutants.py compare BEFORE.json AFTER.json

Needs pytest-cov beside the test extra. The mutants depend on ``--seed`` and on the code alone: one a statement, in an
order drawn by the seed, the first ``--count`` of them. To compare the tests of two trees, before and after a change:

1. ``record`` and ``run`` on the older tree (``--tree OLD``), with half as many mutants again as are wanted;
2. ``record`` and ``run --common OLD`` on the newer tree: the same mutants, less those in statements that only one has;
3. ``compare`` pairs them, and lists those that only one tree's tests catch.

The tests of the fast lane (``-m "not slow"``) run first, the quickest first, so that a run also says what that lane
catches alone; ``--lane fast`` leaves out the others. A mutant counts as caught if a test fails, or exceeds its time
limit, that passes without the mutant. Each mutant has a copy of the tree; its tests run in a fork of a process that
has imported PyTorch and the like, but nothing of ``mtr_lab``.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import mutations
import pytest
from mutations import SCOPES, Mutant, Statement, name_of

ROOT = Path(__file__).parent.parent
PRELOADED = ["torch", "torch._dynamo", "torchvision", "timm", "lightning", "torchmetrics", "numba", "hydra", "wandb"]
PRELOADED += ["hypothesis", "segmentation_models_pytorch"]
BUDGET = 120  # recorded seconds of tests that a mutant has to survive in each lane


def record(tree: Path, folder: Path, workers: int) -> None:
    """Run the tests once under coverage with a context each; ``tests.json`` has their seconds and lanes."""
    tests: dict[str, list] = defaultdict(lambda: [0.0, False])

    class Reports:
        @staticmethod
        def pytest_runtest_logreport(report: pytest.TestReport) -> None:
            tests[report.nodeid][0] += report.duration
            tests[report.nodeid][1] = "slow" in report.keywords

    folder.mkdir(parents=True)
    os.environ["COVERAGE_FILE"] = str(folder / "coverage")
    enter(tree)
    options = ["--cov=mtr_lab", "--cov-context=test", "--cov-report=", "-p", "no:cacheprovider", "-q"]
    status = pytest.main([*options, f"-n{workers}", "tests"], plugins=[Reports()])
    described = {"commit": commit(tree), "status": status, "tests": tests}
    (folder / "tests.json").write_text(json.dumps(described, indent=0))


def enter(tree: Path) -> None:
    """Make this process and those it starts import ``mtr_lab`` and the tests of ``tree``."""
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests"))]
    os.environ["PYTHONPATH"] = str(tree)
    os.chdir(tree)


def commit(tree: Path) -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True).stdout.strip()


class Coverage:
    """Which tests cover a statement, by the record of its tree."""

    def __init__(self, folder: Path, tree: Path) -> None:
        from coverage import CoverageData

        data = CoverageData(str(folder / "coverage"))
        data.read()
        self.lines = {
            "mtr_lab/" + path.rpartition("/mtr_lab/")[2]: {
                line: {context.rpartition("|")[0] for context in contexts}
                for line, contexts in data.contexts_by_lineno(path).items()
            }
            for path in data.measured_files()
        }
        self.tests = json.loads((folder / "tests.json").read_text())["tests"]
        self.tree, self.statements = tree, mutations.statements(tree)
        self.test_files = {path: path.read_text() for path in tree.glob("tests/**/*.py")}
        self.mentions = defaultdict(list)
        for one in self.statements:
            for name in {name_of(part) for part in mutations.parts(one.node)}:
                self.mentions[name].append(one)

    def of(self, statement: Statement, line: int) -> list[str]:
        """The tests that run a line, or its statement, as far as the budget of a lane goes.

        The tracer sees neither what numba compiles nor what other processes run. For such a statement: the tests in
        the files that import its module, then those that run what mentions the name it is part of.
        """
        tests = self.run_by([statement], [line]) or self.run_by([statement])
        ways = [tests]
        if not tests or not statement.function:
            ways += [self.in_files_that_import(statement.file), self.mentioning(statement)]
        chosen = dict.fromkeys(test for way in ways for test in self.within_budget(way))
        return sorted(chosen, key=lambda test: self.tests[test][1])

    def run_by(self, those: list[Statement], only: list[int] | None = None) -> set[str]:
        """What runs when a file is imported does not count: it runs in the test that happens to be the first."""
        tests: set[str] = set()
        for one in those:
            lambdas = any(isinstance(part, ast.Lambda) for part in mutations.parts(one.node))
            if lambdas or (one.function and not isinstance(one.node, SCOPES)):
                lines = self.lines.get(one.file, {})
                tests = tests.union(*(lines.get(n, ()) for n in only or range(one.node.lineno, one.last_line + 1)))
        return tests & self.tests.keys()

    def in_files_that_import(self, file: str) -> set[str]:
        package, _, module = file.removesuffix(".py").replace("/", ".").rpartition(".")
        imports = rf"\b{re.escape(package)}(\.| import .*\b){module}\b"
        for _ in range(2):  # through a module of the tests
            files = {path for path, text in self.test_files.items() if re.search(imports, text, re.MULTILINE)}
            imports += "".join(rf"|^from {path.stem} import" for path in files)
        return {test for test in self.tests if self.tree / test.partition("::")[0] in files}

    def mentioning(self, statement: Statement) -> set[str]:
        front, seen = [statement], set()
        if isinstance(statement.node, SCOPES):  # a default value
            inner = f"{statement.function}.{statement.node.name}".lstrip(".")
            front = [one for one in self.statements if (one.file, one.function) == (statement.file, inner)]
        while front and not (tests := self.run_by(front)):
            seen.update(front)
            names = set()
            for one in front:
                targets = getattr(one.node, "targets", [getattr(one.node, "target", None)])
                scopes = ["", *(name for name in one.function.split(".") if not name.startswith("__"))]
                names |= {scopes[-1]} if one.function else set(map(name_of, targets))
            front = [one for name in names - {""} for one in self.mentions[name] if one not in seen]
        return tests if front else set()

    def within_budget(self, tests: set[str]) -> list[str]:
        """The fast lane first, the quickest first, until the budget of a lane is spent."""
        spent, chosen = [0.0, 0.0], []
        for test in sorted(tests, key=lambda test: (self.tests[test][1], self.tests[test][0], test)):
            seconds, slow = self.tests[test]
            if spent[slow] <= BUDGET:
                chosen.append(test)
            spent[slow] += seconds
        return chosen


class Chosen:
    """Plugin of a mutant's run: these tests in this order, each within its time; writes down the first that fails."""

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
            why = crash.message.split("\n")[0] if crash else str(report.longrepr).strip().split("\n")[-1]
            self.failure.write_text(json.dumps([report.nodeid, why.strip()[:120]]))

    pytest_collectreport = pytest_runtest_logreport


def first_failure(tree: Path, seconds: dict[str, float]) -> list[str] | None:
    """Run tests in a fork of this process: which fails first, and why; ``None`` if all pass."""
    failure = tree.parent / "failure"
    failure.unlink(missing_ok=True)
    files = sorted({test.partition("::")[0] for test in seconds})
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            output = os.open(tree.parent / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
                os.dup2(source, target)
            enter(tree)
            options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={tree.parent / 'tmp'}", *files]
            status = int(pytest.main(options, plugins=[Chosen(seconds, failure)]))
        finally:
            os._exit(status)
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
    status = os.waitstatus_to_exitcode(done[1])
    return None if status in (0, pytest.ExitCode.NO_TESTS_COLLECTED) else ["", f"exit status {status}"]


def trial(tree: Path, mutant: Mutant, tests: dict[str, float]) -> dict:
    """What came of a mutant; ``fail_without`` are tests that fail without it as well and were left out."""
    start, unsound = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="mutant", ignore_cleanup_errors=True) as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(tree, copy, symlinks=True, ignore=shutil.ignore_patterns(".venv"))
        source = (copy / mutant.file).read_text()
        lines = source.split("\n")
        lines[mutant.line - 1] = mutant.after
        while tests:
            (copy / mutant.file).write_text("\n".join(lines))
            failed = first_failure(copy, tests)
            if not failed or not failed[0]:
                break
            (copy / mutant.file).write_text(source)
            if not first_failure(copy, {failed[0]: tests.get(failed[0], 0)}):
                break
            unsound.append(failed[0])
            tests = {test: seconds for test, seconds in tests.items() if test not in unsound}
    result = {"result": "caught" if tests and failed else "survived" if tests else "not covered", "tests": len(tests)}
    if tests and failed:
        result |= {"test": failed[0], "why": failed[1]}
    return result | {"fail_without": unsound} | {"seconds": round(time.monotonic() - start, 1)}


def run(tree: Path, folder: Path, sample: list[tuple[Statement, Mutant]], lane: str, jobs: int) -> dict:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as tests/conftest.py does, which comes too late
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in PRELOADED:
        importlib.import_module(name)
    covering = Coverage(folder, tree)
    slow = {test for test, (_, is_slow) in covering.tests.items() if is_slow}
    results = {}
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        trials = {}
        for statement, mutant in sample:
            tests = [test for test in covering.of(statement, mutant.line) if lane == "all" or test not in slow]
            trials[pool.submit(trial, tree, mutant, {test: covering.tests[test][0] for test in tests})] = mutant
        for future in concurrent.futures.as_completed(trials):
            mutant, result = trials[future], future.result()
            results[mutant] = dataclasses.asdict(mutant) | {"slow": result.get("test") in slow} | result
            print(f"{len(results)}/{len(trials)} {result['result']}, {result['seconds']} s: {mutant}", flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numba", "triton", "pytest")}
    described = {"commit": commit(tree), "lane": lane, "python": sys.version.split()[0]} | versions
    return described | {"mutants": [results[mutant] for _, mutant in sample]}


def compare(before: Path, after: Path) -> None:
    fields = [field.name for field in dataclasses.fields(Mutant)]
    old, new = (
        {Mutant(**{name: one[name] for name in fields}): one for one in json.loads(path.read_text())["mutants"]}
        for path in (before, after)
    )
    both = [mutant for mutant in new if mutant in old]
    for label, log in (("before", old), ("after", new)):
        caught = [log[mutant] for mutant in both if log[mutant]["result"] == "caught"]
        fast = sum(not one["slow"] for one in caught)
        print(f"{label}: {len(caught)} of {len(both)} caught, {fast} by the fast lane alone")
    for mutant in both:
        if (old[mutant]["result"] == "caught") != (new[mutant]["result"] == "caught"):
            print(f"{old[mutant]['result']} -> {new[mutant]['result']}: {mutant}")


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
        record(tree, *paths, options.jobs)
    elif options.command == "compare":
        compare(*paths)
    else:
        sample = mutations.draw(tree, options.seed, options.count, options.common)
        if options.command == "list":
            print(*(mutant for _, mutant in sample), sep="\n")
        else:
            folder, out = paths
            log = {"seed": options.seed} | run(tree, folder, sample, options.lane, options.jobs)
            lines = ",\n  ".join(json.dumps(result, ensure_ascii=False) for result in log.pop("mutants"))
            out.write_text(f'{json.dumps(log, indent=1)[:-2]},\n "mutants": [\n  {lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
