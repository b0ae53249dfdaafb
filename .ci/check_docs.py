"""Check the documentation: links and named files exist, Python examples run, commands know the options shown.

And every public name is in the reference. That the site builds without a warning is Sphinx's to check.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "export/README.md"]
REFERENCE = ROOT / "docs/reference.rst"
#: A file or folder of the repository as text names it, `csrc/cpu/simd.h`; no patterns and no placeholders.
FILE = r"`((?:\.ci|\.github|benchmarks|csrc|docs|examples|export|nodeshape|tests)/[\w./-]*)`"


def broken_links(text: str, folder: Path) -> list[str]:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    return [
        f"link to {t}, which is not there"
        for t in targets
        if not t.startswith(("http:", "https:")) and not (folder / t).exists()
    ]


def missing_files(text: str) -> list[str]:
    return [f"names {path}, which is not there" for path in re.findall(FILE, text) if not (ROOT / path).exists()]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Modules and options of the ``python -m nodeshape.X`` commands on a page."""
    found = re.findall(r"-m (nodeshape\.\w+)([^`\n]*)", text)
    return [
        (module, [w.split("=")[0] for w in shlex.split(rest, comments=True) if w.startswith("--")])
        for module, rest in found
    ]


def unknown_options(text: str, helps: dict[str, str]) -> Iterator[str]:
    for module, options in commands(text):
        if module not in helps:
            yield f"no command {module}"
            continue
        for option in options:
            if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", helps[module]):
                yield f"{module} has no option {option}"


def examples(text: str) -> list[str]:
    """Python blocks; a line that reads a run's file is left out."""
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return ["\n".join(line for line in block.splitlines() if "runs/" not in line) for block in blocks]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the package, in a folder that takes what examples write."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *arguments]
        where = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": path}}
        return subprocess.run(command, capture_output=True, text=True, check=False, **where)


def help_of(module: str) -> str:
    done = python("-m", module, "--help")
    if done.returncode:
        sys.exit(f"python -m {module} --help fails:\n{done.stderr}")
    return done.stdout


def failure(example: str) -> str | None:
    done = python("-c", example)
    return f"example fails: {done.stderr.strip().splitlines()[-1]}" if done.returncode else None


def names_without_reference() -> list[str]:
    """Public names that the reference does not have."""
    public = ast.literal_eval(python("-c", "import nodeshape; print(nodeshape.__all__)").stdout)
    reference = REFERENCE.read_text()
    return [f"lacks nodeshape.{name}" for name in public if not re.search(rf"nodeshape\.{name}\b", reference)]


def main() -> None:
    texts = {page: page.read_text() for page in PAGES}
    modules = sorted({module for text in texts.values() for module, _ in commands(text)})
    modules = [module for module in modules if (ROOT / (module.replace(".", "/") + ".py")).exists()]
    shown = [(page, example) for page, text in texts.items() for example in examples(text)]
    with ThreadPoolExecutor() as pool:  # each in a process of its own, most of whose time is importing torch
        failures = pool.map(failure, [example for _, example in shown])
        helps = dict(zip(modules, pool.map(help_of, modules)))
        problems = [(page, problem) for (page, _), problem in zip(shown, failures) if problem]
    problems += [(REFERENCE, problem) for problem in names_without_reference()]
    for page, text in texts.items():
        found = [*broken_links(text, page.parent), *missing_files(text), *unknown_options(text, helps)]
        problems += [(page, problem) for problem in found]
    for page, problem in problems:
        print(f"{page.relative_to(ROOT)}: {problem}")
    if problems:
        sys.exit(1)
    print(f"{len(PAGES)} pages checked: {len(shown)} examples run, {len(modules)} commands asked for their options")


if __name__ == "__main__":
    main()
