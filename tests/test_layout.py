"""The layout of the package: what stands where, and what each folder may import (docs/structure.md)."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch

import nodeshape as ns

PACKAGE = Path(ns.__path__[0])
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if "__pycache__" not in path.parts
}
COMMANDS = {"train", "export", "predict", "data", "bench", "paper"}
SHARED = {"_cli", "_files", "_errors"}
#: Folders that each folder may import, besides itself and what all share; None for any.
MAY_IMPORT: dict[str, set[str] | None] = {
    "_ode": set(),
    "_models": {"_ode"},
    "_data": set(),
    "_training": {"_models", "_data", "_ode"},
    "_exporting": {"_models", "_data", "_ode"},
    "_benchmarking": None,
    "_experiments": None,
}


def imports(source: str, modules: set[str]) -> set[str]:
    """Modules of the package that a module imports anywhere in it, in a function or for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name.removeprefix("nodeshape.") for name in names}
    return found & modules


GRAPH = {name: imports(path.read_text("utf-8"), set(MODULES)) for name, path in MODULES.items()}


def home(module: str) -> str:
    return module.split(".")[0]


def test_the_top_holds_commands_and_what_all_share() -> None:
    files = {path.name for path in PACKAGE.iterdir() if path.is_file() and path.suffix != ".so"}
    expected = {f"{name}.py" for name in COMMANDS | SHARED | {"__init__", "__main__"}} | {"py.typed"}
    assert files == expected and len(files) <= 16
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(MAY_IMPORT)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_its_rule_allows(folder: str) -> None:
    allowed = MAY_IMPORT[folder]
    used = {home(used) for name, uses in GRAPH.items() if home(name) == folder for used in uses}
    assert used, "the folder's imports were not found"
    if allowed is not None:
        assert used <= {folder} | allowed | SHARED


def test_what_all_share_imports_nothing_of_the_folders() -> None:
    assert {used for name in SHARED for used in GRAPH[name]} <= SHARED


def test_only_their_commands_import_the_bench_and_the_experiments() -> None:
    for name, used in GRAPH.items():
        if any(home(x) == "_experiments" for x in used):
            assert name == "paper" or home(name) == "_experiments", name
        if any(home(x) == "_benchmarking" for x in used):
            assert name == "bench" or home(name) in ("_benchmarking", "_experiments"), name


def test_no_module_imports_itself_through_others() -> None:
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


def test_a_circle_and_a_lazy_import_would_be_found() -> None:
    lazy = "def f():\n    from nodeshape._ode import sweep\n"
    checked = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import nodeshape._ode.stage\n"
    assert imports(lazy + checked, {"_ode.sweep", "_ode.stage"}) == {"_ode.sweep", "_ode.stage"}
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


@pytest.mark.parametrize("module", ["nodeshape._data.images", "nodeshape._data.shapes", "nodeshape.predict"])
def test_reading_and_drawing_images_and_predict_never_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_whatever_is_printed_is_printable() -> None:
    """Names of files and classes cannot forge lines: all is printed by ``say``, bars apart."""
    allowed = {
        "_cli",
        "__main__",
        "_experiments.depth",
        "_experiments.table1",
        "_benchmarking.deploy",
    }  # these print numbers for another process
    printing = {
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert "_cli" in printing and printing <= allowed


@pytest.mark.parametrize("name", [name for name in ns.__all__ if name != "__version__"])
def test_public_names_say_that_they_are_nodeshapes(name: str) -> None:
    value = getattr(ns, name)
    assert value.__module__ == "nodeshape" and value.__qualname__ == name
    assert pickle.loads(pickle.dumps(value)) is value


@pytest.mark.slow
def test_each_header_stands_by_itself() -> None:
    root = PACKAGE.parent
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-fsyntax-only", "-Wno-attributes", "-DTORCH_TARGET_VERSION=0x020a000000000000"]

    def errors(header: Path) -> str:
        command = ["c++", *flags, "-isystem", str(include), "-x", "c++", str(header)]
        return subprocess.run(command, capture_output=True, text=True).stderr

    headers = sorted((root / "csrc").glob("*.h")) + sorted((root / "csrc/cpu").glob("*.h"))
    assert len(headers) > 30
    with ThreadPoolExecutor() as pool:
        wrong = {str(header): said for header, said in zip(headers, pool.map(errors, headers)) if "error:" in said}
    assert not wrong
