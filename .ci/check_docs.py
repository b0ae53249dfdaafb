"""Check the documentation: links lead somewhere, Python examples run, and commands shown exist with their options."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def broken_links(page: Path) -> list[str]:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    return [t for t in targets if not t.startswith(("http:", "https:")) and not (page.parent / t).exists()]


def unknown_options(page: Path) -> list[str]:
    """Options of ``python -m nodeshape.X`` commands that its --help does not know."""
    wrong = []
    for module, rest in re.findall(r"python -m (nodeshape\.\w+)([^`\n]*)", page.read_text()):
        if not (ROOT / (module.replace(".", "/") + ".py")).exists():
            wrong.append(f"no command {module}")
            continue
        shown = help_of(module)
        options = [w.split("=")[0] for w in shlex.split(rest, comments=True) if w.startswith("--")]
        wrong += [f"{module} has no option {o}" for o in options if not re.search(rf"{re.escape(o)}\b", shown)]
    return wrong


_helps: dict[str, str] = {}


def help_of(module: str) -> str:
    if module not in _helps:
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT, check=True
        )
        _helps[module] = done.stdout
    return _helps[module]


def failing_examples(page: Path) -> list[str]:
    """Python blocks that raise; a line that reads a run's file is left out."""
    wrong = []
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        code = "\n".join(line for line in block.splitlines() if "runs/" not in line)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
        if done.returncode:
            wrong.append(f"example fails: {done.stderr.strip().splitlines()[-1]}")
    return wrong


def main() -> None:
    problems = [
        f"{page.relative_to(ROOT)}: {problem}"
        for page in PAGES
        for problem in [*broken_links(page), *unknown_options(page), *failing_examples(page)]
    ]
    print("\n".join(problems) or f"{len(PAGES)} pages checked")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
