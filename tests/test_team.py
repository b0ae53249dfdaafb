"""Threads that share a lone sample's work: under ThreadSanitizer, which torch's own thread pool does not run under."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("team.cpp")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_all_threads_of_a_team_work_and_have_no_data_race(tmp_path):
    program = tmp_path / "team"
    command = ["g++", "-std=c++20", "-O1", "-g", "-pthread", "-DNODESHAPE_TARGET=portable", str(SOURCE)]
    built = subprocess.run([*command, "-fsanitize=thread", "-o", str(program)], capture_output=True, text=True)
    if "cannot find" in built.stderr and "tsan" in built.stderr:
        pytest.skip("g++ has no ThreadSanitizer here")
    assert built.returncode == 0, built.stderr
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines() == [*(f"{size} of {size} threads" for size in range(1, 5)), "0 wrong"]
