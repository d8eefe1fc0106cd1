"""The rooms of the package keep apart. import-linter checks the layers, these tests what it cannot."""

import ast
import importlib
import inspect
import re
import tokenize
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

import mtr_lab
from mtr_lab.backbones import FAMILIES
from mtr_lab.ops import BACKENDS

PACKAGE = Path(mtr_lab.__file__).parent
FAMILY_NAMES = {family.__name__ for family in FAMILIES}
SHARED = "mtr_lab.backbones.vision_mamba"
"""What the families have in common."""


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    """Which module imports which, inside functions, too."""
    return grimp.build_graph("mtr_lab", exclude_type_checking_imports=True, cache_dir=None)


def test_no_modules_import_each_other_in_a_circle(imports: grimp.ImportGraph) -> None:
    modules = {module: imports.find_modules_directly_imported_by(module) for module in imports.modules}
    assert {"mtr_lab.tokens.state", "mtr_lab.ops.registry"} <= modules.keys()
    list(TopologicalSorter(modules).static_order())  # a CycleError names them


@pytest.mark.parametrize("family", sorted(FAMILY_NAMES))
def test_a_family_is_imported_by_the_list_of_families_alone(imports: grimp.ImportGraph, family: str) -> None:
    assert imports.find_modules_that_directly_import(family) == {"mtr_lab.backbones"}


def test_what_families_share_is_imported_by_families_alone(imports: grimp.ImportGraph) -> None:
    assert imports.find_modules_that_directly_import(SHARED) <= FAMILY_NAMES


def test_no_class_of_a_family_is_named_outside_the_backbones() -> None:
    classes = {
        name
        for module in (*FAMILIES, importlib.import_module(SHARED))
        for name, kind in inspect.getmembers(module, inspect.isclass)
        if kind.__module__ == module.__name__
    }
    assert {"Vim", "VideoMamba", "VisionMamba"} <= classes
    for file in PACKAGE.rglob("*.py"):
        if PACKAGE / "backbones" not in file.parents:
            with file.open("rb") as source:
                names = {token.string for token in tokenize.tokenize(source.readline) if token.type == tokenize.NAME}
            assert not names & classes, file


@pytest.mark.parametrize("room", ["reduction", "tokens"])
def test_operations_alone_ask_for_a_device_or_a_backend(room: str) -> None:
    quoted = "|".join(["cuda", *BACKENDS[1:]])
    asks = re.compile(rf"\.is_cuda\b|\.device\.type\b|[\"']({quoted})[\"']|\b(use|set|selected|check)_backend\b")
    for file in (PACKAGE / room).rglob("*.py"):
        assert not asks.findall(file.read_text()), file


def test_nothing_is_unpickled() -> None:
    """``pickle`` and ``torch.load`` without ``weights_only`` run code that stands in a file."""
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        imported += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        unsafe = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
        assert not unsafe & {name.partition(".")[0] for name in imported}, file
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            if name in ("load", "eval", "exec", "unsafe_load"):
                called = ast.unparse(call.func)
                safe = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}
                assert called not in safe or safe[called] in ast.unparse(call), f"{file}:{call.lineno}"
                assert called not in ("eval", "exec", "yaml.load", "yaml.unsafe_load"), f"{file}:{call.lineno}"
