"""How many small mistakes in the checks of arguments the tests notice: python tests/mutate.py cpp|python.

A mutant is the source with one condition changed: a comparison turned around or moved by its boundary, ``and`` for
``or``, a part without its ``not``, a number one larger, the check left out. The tests of ``SUITES`` run on each until
one fails: the mutant is killed. Those that survive are listed, and how many were killed is said per file.

All mutants are in one copy of the package, whose conditions ask a number which of them to be. pytest collects the tests
once; every mutant is then a fork of that process.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import copy
import ctypes
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import pytest

ROOT = Path(__file__).parent.parent
#: Files with checks of the ops. What else they decide, where a buffer lies for example, is not changed.
CPP = [f"csrc/{name}" for name in ("arguments.h", "solve_ops.h", "program_plan.h", "sizes.h")]
CPP += ["csrc/cpu/adaptive_ops.cpp"]
#: Files with checks of the solver; the functions and classes of which all conditions are changed, not only those that
#: raise.
PYTHON = {
    "options": ["count", "positive", "_not_negative", "_times", "read_options", "check_steps", "steps_of"],
    "odeint": ["check_resolution", "tensors_of", "times_of", "_check_results", "_check_tolerances", "_per_sample"],
    "odeint_event": ["odeint_event"],
    "sdeint": ["_method_of"],
    "method": ["Method", "get_method"],
    "backend": ["default_method", "Request", "_on_grid"],
}
#: What the tests are, the quickest first, and which of them.
SUITES = {
    "cpp": (
        ["test_op_arguments", "test_fused_ops"],
        "not opcheck and not compiled and not exported and not scripted and not forked and not threads"
        " and not finite_differences",
    ),
    "python": (
        ["test_arguments", "test_odeint", "test_sde", "test_methods"],
        "test_arguments or refused or named or clear_error or coarse or own_times or said or row_per_time or stats"
        " or recompute or vmap",
    ),
}
#: Seconds and bytes after which a mutant that goes on for ever, or takes all memory, is killed.
PATIENCE, MEMORY = 60, 24 << 30


@dataclass
class Mutant:
    """One changed condition.

    Attributes:
        start, end: of the condition in the file, in bytes.
    """

    file: str
    line: int
    start: int
    end: int
    original: str
    changed: str

    def __str__(self) -> str:
        original, changed = (" ".join(text.split()) for text in (self.original, self.changed))
        return f"{self.file}:{self.line}: {original}  ->  {changed}"


# ---- C++ -------------------------------------------------------------------------------------------------------------

CONDITION = re.compile(r"(?<![\w.:])(NODESHAPE_CHECK|(?<!void )check|if) ?\((?!bool good|!\(good\))")
#: What follows the condition of a statement that belongs to a check.
DECIDES = re.compile(r"\)\s*(throw\b|return;|return \{\}|NODESHAPE_CHECK\b|check)")
TURNED = {"<": (">=", "<="), "<=": (">", "<"), ">": ("<=", ">="), ">=": ("<", ">"), "==": ("!=",), "!=": ("==",)}
TURNED |= {"&&": ("||",), "||": ("&&",)}
OPERATOR = re.compile(r"(?<=\s)(<=|>=|==|!=|<|>|&&|\|\|)(?=\s)")
NOT = re.compile(r"!(?=[\w(])")
NUMBER = re.compile(r"(?<![\w.'\"])(\d+|k[A-Z]\w*)(?![\w.'\"(])")


def first_argument(source: str, start: int) -> int:
    """Where the argument that begins at ``start``, behind a parenthesis, ends."""
    depth = 0
    for at in range(start, len(source)):
        character = source[at]
        if depth == 0 and character in ",)":
            return at
        depth += (character in "([{") - (character in ")]}")
    raise ValueError("a parenthesis is not closed")


def changed_cpp(condition: str, may_be_left_out: str) -> Iterator[str]:
    def with_part(match: re.Match[str], text: str) -> str:
        return condition[: match.start()] + text + condition[match.end() :]

    for match in OPERATOR.finditer(condition):
        yield from (with_part(match, text) for text in TURNED[match[1]])
    yield from (with_part(match, "") for match in NOT.finditer(condition))
    yield from (with_part(match, f"({match[1]} + 1)") for match in NUMBER.finditer(condition))
    if not OPERATOR.search(condition) and not NOT.search(condition):
        yield f"!({condition})"
    yield may_be_left_out


def cpp_mutants() -> Iterator[Mutant]:
    for file in CPP:
        source = (ROOT / file).read_text()
        for match in CONDITION.finditer(source):
            line = source[source.rfind("\n", 0, match.start()) + 1 : match.start()]
            if "//" in line or "#define" in line:
                continue
            end = first_argument(source, match.end())
            if match[1] == "if" and not DECIDES.match(source, end):
                continue
            condition = source[match.end() : end]
            for text in changed_cpp(condition, "false" if match[1] == "if" else "true"):
                yield Mutant(file, source.count("\n", 0, match.start()) + 1, match.end(), end, condition, text)


def write_cpp(folder: Path, mutants: list[Mutant]) -> None:
    """Build the library with all ``mutants`` in it, of portable kernels."""
    choose(
        folder, mutants, lambda number, text, rest: f"nodeshape_mutant == {number} ? bool({text}) : {rest}", "bool({})"
    )
    sizes = folder / "csrc/sizes.h"
    number = 'extern "C" { inline int nodeshape_mutant __attribute__((visibility("default"), used)) = 0; }'
    sizes.write_text(sizes.read_text().replace("#pragma once", f"#pragma once\n{number}", 1))
    environment = os.environ | {"NODESHAPE_PORTABLE": "1", "NODESHAPE_CXXFLAGS": "-O1", "NODESHAPE_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=environment, check=True)


# ---- Python ----------------------------------------------------------------------------------------------------------

CHANGED_OPERATORS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.GtE, ast.LtE),
    ast.LtE: (ast.Gt, ast.Lt),
    ast.Gt: (ast.LtE, ast.GtE),
    ast.GtE: (ast.Lt, ast.Gt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}


def conditions_in(node: ast.AST, everything: bool) -> Iterator[ast.expr]:
    """The outermost conditions below ``node``: all, or those of errors."""
    for child in ast.iter_child_nodes(node):
        raises = isinstance(child, ast.If) and any(isinstance(x, ast.Raise) for x in child.body)
        if isinstance(child, (ast.If, ast.IfExp, ast.While)) and (raises or everything):
            yield child.test
            for part in ast.iter_child_nodes(child):
                if part is not child.test:
                    yield from conditions_in(ast.Module([part], []), everything)  # type: ignore[list-item]
        elif everything and (
            isinstance(child, (ast.Compare, ast.BoolOp))
            or (isinstance(child, ast.UnaryOp) and isinstance(child.op, ast.Not))
        ):
            yield child
        else:
            yield from conditions_in(child, everything)


def changed_python(condition: ast.expr) -> Iterator[ast.expr]:
    def with_change(index: int) -> tuple[ast.expr, ast.AST]:
        other = copy.deepcopy(condition)
        return other, list(ast.walk(other))[index]

    plain = True
    for index, node in enumerate(ast.walk(condition)):
        if isinstance(node, ast.Compare):
            for k, operator in enumerate(node.ops):
                for kind in CHANGED_OPERATORS[type(operator)]:
                    other, place = with_change(index)
                    place.ops[k] = kind()  # type: ignore[attr-defined]
                    yield other
        elif isinstance(node, ast.BoolOp):
            other, place = with_change(index)
            place.op = CHANGED_OPERATORS[type(node.op)][0]()  # type: ignore[attr-defined]
            yield other
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            other, place = with_change(index)
            place.op, place.operand = ast.Not(), ast.UnaryOp(ast.Not(), node.operand)  # type: ignore[attr-defined]
            yield other
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            other, place = with_change(index)
            place.value = node.value + 1  # type: ignore[attr-defined]
            yield other
            continue
        else:
            continue
        plain = False
    if plain:
        yield ast.UnaryOp(ast.Not(), condition)


def python_mutants() -> Iterator[Mutant]:
    for name, scopes in PYTHON.items():
        file = f"nodeshape/_ode/{name}.py"
        source = (ROOT / file).read_bytes()
        starts = [0]
        for line in source.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        for statement in ast.parse(source).body:
            everything = getattr(statement, "name", None) in scopes
            for condition in conditions_in(ast.Module([statement], []), everything):
                start = starts[condition.lineno - 1] + condition.col_offset
                end = starts[condition.end_lineno - 1] + condition.end_col_offset  # type: ignore[operator]
                texts = [ast.unparse(ast.fix_missing_locations(x)) for x in changed_python(condition)]
                for text in [*texts, "False"]:
                    yield Mutant(file, condition.lineno, start, end, source[start:end].decode(), f"({text})")


def write_python(folder: Path, mutants: list[Mutant]) -> None:
    """Write all ``mutants`` into the modules; the number is a builtin, which they need not import."""
    builtins.nodeshape_mutant = 0  # type: ignore[attr-defined]
    choose(folder, mutants, lambda number, text, rest: f"{text} if nodeshape_mutant == {number} else {rest}", "({})")
    for library in (ROOT / "nodeshape/_ode").glob("*.so"):
        shutil.copy(library, folder / "nodeshape/_ode")


# ---- runs ------------------------------------------------------------------------------------------------------------


def choose(folder: Path, mutants: list[Mutant], either: Callable[[int, str, str], str], original: str) -> None:
    """Put all ``mutants`` into the files of ``folder``, each where ``nodeshape_mutant`` is its number from 1 on."""
    conditions = defaultdict(list)
    for number, mutant in enumerate(mutants, 1):
        conditions[mutant.file, mutant.start, mutant.end].append((number, mutant))
    for (file, start, end), found in sorted(
        conditions.items(), key=lambda item: -item[0][1]
    ):  # the last of a file first
        path = folder / file
        source = path.read_bytes()
        text = original.format(source[start:end].decode())
        for number, mutant in found:
            text = either(number, mutant.changed, text)
        path.write_bytes(source[:start] + f"({text})".encode() + source[end:])


class Forks:
    """A plugin of pytest: each mutant runs the tests that were collected in a process of its own.

    Attributes:
        survivors: mutants whose tests all passed.
    """

    def __init__(self, mutants: list[Mutant], folder: Path, suite: str) -> None:
        self.mutants, self.folder, self.suite = mutants, folder, suite
        self.survivors: list[Mutant] = []

    def become(self, number: int) -> None:
        """The mutant of this number; called in its process."""
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if self.suite == "python":
            builtins.nodeshape_mutant = number  # type: ignore[attr-defined]
        else:
            library = ctypes.CDLL(str(self.folder / "nodeshape/_ode/libnodeshape_cpu.so"))
            ctypes.c_int.in_dll(library, "nodeshape_mutant").value = number

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self) -> bool | None:
        for number, mutant in enumerate([None, *self.mutants]):
            began, child = time.monotonic(), os.fork()
            if child == 0:
                self.become(number)
                return None  # and go on with the tests
            survived = ends_well(child)
            if mutant is None and not survived:
                raise pytest.UsageError(f"tests fail without a mutant:\n{(self.folder / 'log').read_text()[-3000:]}")
            if mutant is None:
                continue
            if survived:
                self.survivors.append(mutant)
            what = "SURVIVED" if survived else "killed  "
            line = f"{number}/{len(self.mutants)} {what} {time.monotonic() - began:5.1f} s  {mutant}\n"
            os.write(2, line.encode())
        return True


def ends_well(child: int) -> bool:
    deadline = time.monotonic() + PATIENCE
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.02)


def survivors(suite: str, mutants: list[Mutant], folder: Path) -> list[Mutant]:
    for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    {"cpp": write_cpp, "python": write_python}[suite](folder, mutants)
    files, expression = SUITES[suite]
    main, plugin = os.getpid(), Forks(mutants, folder, suite)
    os.chdir(folder)
    sys.path[0] = str(folder)
    arguments = [
        "-x",
        "-q",
        "-n0",
        "-s",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:faulthandler",
        "--tb=no",
        "-k",
        expression,
    ]
    code = pytest.main([*arguments, *(f"tests/{name}.py" for name in files)], plugins=[plugin])
    if os.getpid() != main:
        os._exit(code)
    if code != 0:
        sys.exit(f"pytest ended with {code}")
    return plugin.survivors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--sample", type=int, help="how many mutants, chosen at random (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--match", default="", help="only mutants whose line here matches a regular expression")
    parser.add_argument("--list", action="store_true", help="name the mutants and try none")
    arguments = parser.parse_args()
    mutants = list({"cpp": cpp_mutants, "python": python_mutants}[arguments.suite]())
    mutants = [x for x in mutants if re.search(arguments.match, str(x))]
    if arguments.sample and arguments.sample < len(mutants):
        mutants = random.Random(arguments.seed).sample(mutants, arguments.sample)
    if arguments.list:
        print(*mutants, sep="\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        left = survivors(arguments.suite, mutants, Path(folder))
    for file in sorted({x.file for x in mutants}):
        total, alive = (sum(x.file == file for x in some) for some in (mutants, left))
        print(f"{file}: {total - alive} of {total} killed")
    killed = len(mutants) - len(left)
    print(f"{killed} of {len(mutants)} killed, {100 * killed / len(mutants):.1f}%; survived:", *left, sep="\n  ")


if __name__ == "__main__":
    main()
