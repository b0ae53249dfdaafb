"""Several processes: they compute what one computes, one of them speaks and writes, and losing one ends the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from nodeshape._data.shapes import draw
from nodeshape._training.processes import Processes

# 33 images in batches of 16: the last batch holds one, so that a process gets none of it.
SMALL = ["--train-size", "33", "--test-size", "31", "--batch-size", "16", "--step-size", "0.5", "--image-size", "16"]
SMALL += ["--device", "cpu", "--dtype", "float64"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def start(processes: int, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    launcher = [] if processes == 1 else TORCHRUN
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "nodeshape.train", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(processes: int, *arguments: str, cwd: Path) -> str:
    process = start(processes, *arguments, cwd=cwd)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "last.pt", weights_only=True)["model"]


def assert_same_weights(run: Path, other: Path, tolerance: float = 1e-10) -> None:
    expected = weights(other)
    assert weights(run).keys() == expected.keys()
    for name, value in weights(run).items():
        assert torch.allclose(value.double(), expected[name].double(), rtol=0, atol=tolerance), name


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


EXTRAS = ["--class-weights", "balanced", "--clip-norm", "0.5", "--augment", "turn"]


@pytest.mark.parametrize(
    "extras", [[], pytest.param(EXTRAS, marks=pytest.mark.slow)], ids=["plain", "clipped, class-weighted and augmented"]
)
def test_two_processes_give_the_weights_of_one(extras: list[str], tmp_path: Path) -> None:
    """In float64: in float32 rounding alone, as of another number of threads, grows through an epoch."""
    train(1, *SMALL, *extras, "--epochs", "2", "--out", "one", cwd=tmp_path)
    output = train(2, *SMALL, *extras, "--epochs", "2", "--out", "two", cwd=tmp_path)
    assert_same_weights(tmp_path / "two", tmp_path / "one")
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two")):
        assert one["test_accuracy"] == two["test_accuracy"]
        assert one["train_loss"] == pytest.approx(two["train_loss"], abs=1e-10)
        assert one["nfe_forward"] == two["nfe_forward"] and one["nfe_backward"] == two["nfe_backward"]
    assert output.count("epoch 1/2") == 1, "only process 0 prints"
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    train(1, *SMALL, "--epochs", "20", "--out", "whole", cwd=tmp_path)
    process = start(2, *SMALL, "--epochs", "20", "--out", "run", cwd=tmp_path)
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert "interrupted in epoch" in output
    output = train(1, "--resume", "--out", "run", cwd=tmp_path)
    assert "best: " in output
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_a_killed_process_ends_the_run_with_a_message(tmp_path: Path) -> None:
    process = start(2, *SMALL, "--epochs", "1000", "--out", "run", cwd=tmp_path)
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    victim = max(children(process.pid))
    os.kill(victim, signal.SIGKILL)
    output, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "lost contact with the others" in errors and "--resume --out run" in errors
    assert "epoch 1/1000" in output and "epoch 1000/1000" not in output
    assert weights(tmp_path / "run")


def test_unreadable_files_of_all_processes_are_counted(tmp_path: Path) -> None:
    for part, count in (("train", 36), ("test", 6)):
        for index in range(count):
            image, label = draw("single", 5, index, 20)
            path = tmp_path / "data" / part / f"class{label}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    for path in list((tmp_path / "data" / "train").rglob("*.png"))[::6]:
        path.write_text("not an image")
    arguments = ["--data", "data", "--stream", *SMALL[4:], "--epochs", "1", "--out", "run"]
    process = start(2, *arguments, cwd=tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert errors.count("unreadable files passed over: 6") == 1


def test_a_machine_s_process_count_alone_makes_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert Processes.from_environment() == Processes()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [(["--data", "nowhere"], "no such folder"), (["--epochs", "0"], "expected a whole number")],
    ids=["folder", "flag"],
)
def test_a_users_mistake_is_told_once(
    mistake: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the process that tells it is late, as the end of any process makes torchrun end the others."""
    late = "import os, time\nif os.environ.get('RANK') == '0': time.sleep(2)"
    (tmp_path / "sitecustomize.py").write_text(late)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start(2, *mistake, cwd=tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert errors.count(message) == 1
    assert not (tmp_path / "runs").exists()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(1800):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    raise AssertionError(f"{path} was not written")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
