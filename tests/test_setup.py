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


def build(folder: Path, compiler: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Build a copy of the project in a folder with a compiler of a line of shell."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "nodeshape"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    tools = folder / "tools"
    tools.mkdir()
    script(tools / "fast-c++", compiler)
    script(tools / "nvcc", "echo no kernel image >&2; exit 1")
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "CXX": str(tools / "fast-c++"), **settings}
    return subprocess.run(
        [sys.executable, "-c", BUILD], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


#: Makes an empty file of whatever it is to make.
EMPTY_FILES = 'while [ "$1" != -o ]; do shift; done; : > "$2"'


@pytest.mark.parametrize("forced", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_failing_nvcc_stops_only_an_installation_that_asks_for_cuda(forced: bool, tmp_path: Path) -> None:
    done = build(tmp_path, EMPTY_FILES, FORCE_CUDA="1" if forced else "0", NODESHAPE_CUDA="1")
    libraries = {path.name for path in (tmp_path / "nodeshape" / "_ode").glob("*.so")}
    if forced:
        assert done.returncode != 0
    else:
        assert done.returncode == 0, done.stderr
        assert libraries == {"libnodeshape_cpu.so"}
        assert 'building extension "nodeshape._ode._cuda" failed' in done.stdout + done.stderr


@pytest.mark.parametrize("there", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_library_for_onnxruntime_is_linked_from_the_kernels_of_the_other(there: bool, tmp_path: Path) -> None:
    headers = tmp_path / "headers"
    headers.mkdir()
    if there:
        (headers / "onnxruntime_c_api.h").touch()
    log = f'echo "$@" >> {tmp_path}/log; {EMPTY_FILES}'
    done = build(tmp_path, log, NODESHAPE_CUDA="0", NODESHAPE_PORTABLE="1", NODESHAPE_ONNXRUNTIME=str(headers))
    libraries = {path.name for path in (tmp_path / "nodeshape" / "_ode").glob("*.so")}
    if not there:
        assert done.returncode != 0 and not libraries
        assert f"NODESHAPE_ONNXRUNTIME={headers} holds no onnxruntime_c_api.h" in done.stdout + done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert libraries == {"libnodeshape_cpu.so", "libnodeshape_onnxruntime.so"}
    lines = (tmp_path / "log").read_text().splitlines()
    compiled = [line for line in lines if " -c " in line]
    cpu, onnxruntime = (next(line for line in lines if f"libnodeshape_{x}.so" in line) for x in ("cpu", "onnxruntime"))
    assert len(compiled) == 2 + 1 + 6 + 1  # ops, the choice, kernels of each dtype, ops of onnxruntime
    kernels = [word for word in cpu.split() if word.endswith(".o") and not word.endswith("ops.o")]
    assert len(kernels) == 7 and set(kernels) < set(onnxruntime.split())
    assert "-ltorch_cpu" in cpu and "torch" not in onnxruntime.replace(str(tmp_path), "")


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
