"""The installation: what cannot be compiled or loaded is told of, and the rest is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from nodeshape._ode import fused

ROOT = Path(__file__).parents[1]
#: ``python setup.py build_ext --inplace`` where torch has CUDA.
BUILD = """
import runpy, sys, torch
torch.version.cuda = "13.0"
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("forced", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_failing_nvcc_stops_only_an_installation_that_asks_for_cuda(forced: bool, tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "nodeshape"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    tools = tmp_path / "tools"
    tools.mkdir()
    script(tools / "fast-c++", 'while [ "$1" != -o ]; do shift; done; : > "$2"')  # makes empty files
    script(tools / "nvcc", "echo no kernel image >&2; exit 1")
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "CXX": str(tools / "fast-c++")}
    environment |= {"FORCE_CUDA": "1" if forced else "0", "NODESHAPE_CUDA": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    libraries = {path.name for path in (tmp_path / "nodeshape" / "_ode").glob("*.so")}
    if forced:
        assert done.returncode != 0
    else:
        assert done.returncode == 0, done.stderr
        assert libraries == {"libnodeshape_cpu.so"}
        assert 'building extension "nodeshape._ode._cuda" failed' in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        (False, r"libnodeshape_cpu\.so is not built: reinstall with a C\+\+ compiler"),
        (True, r"libnodeshape_cpu\.so does not load: .*"),
    ],
)
def test_a_library_that_is_not_there_or_does_not_load_is_told_of_in_a_line(
    there: bool, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libnodeshape_cpu.so"
    if there:
        library.write_text("no library")
    monkeypatch.setattr(fused, "_LIBRARY", library)
    with pytest.warns(RuntimeWarning, match=f"^{reason}; solves take the plain loop, which is slower$") as told:
        assert fused._load() is not None
    assert len(told) == 1
    assert warnings.formatwarning(told[0].message, told[0].category, told[0].filename, told[0].lineno).count("\n") == 1
