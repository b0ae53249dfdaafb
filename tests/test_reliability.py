"""What docs/reliability.md promises under faults: operations on files that fail, and kills."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parent / "faults"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults are injected by Linux's LD_PRELOAD")


def said(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, FAULTS / script, *arguments], capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("command", "stride"),
    [
        pytest.param("train", "37", id="train, some", marks=pytest.mark.slow),
        pytest.param("data", "9", id="data, some"),
        *(pytest.param(name, "1", marks=pytest.mark.slow) for name in ("train", "export", "data", "data-here")),
    ],
)
def test_a_command_whose_every_operation_on_files_fails_or_kills_it_loses_nothing(command: str, stride: str) -> None:
    assert "all well" in said("sweep.py", command, "--stride", stride)


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing() -> None:
    assert "20 kills, nothing lost" in said("kill_at_random.py", "20")
