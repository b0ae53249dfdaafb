"""Several processes: they compute what one computes, one of them speaks and writes, and losing one ends the run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from nodeshape._data.shapes import draw
from nodeshape._errors import UserError
from nodeshape._training import session
from nodeshape._training.processes import Processes

# 33 images in batches of 16: the last batch holds one, so that a process gets none of it.
SMALL = ["--train-size", "33", "--test-size", "31", "--batch-size", "16", "--step-size", "0.5", "--image-size", "16"]
SMALL += ["--device", "cpu", "--dtype", "float64"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


#: ``python -m nodeshape.train`` whose process RANK gets a signal when STEP batches are done.
SIGNALLED = """
import os, runpy, signal, sys
from nodeshape._training.trainer import BatchDone, Trainer

rank, step, signum, *arguments = sys.argv[1:]
train = Trainer.train

def signalled(self):
    for event in train(self):
        if isinstance(event, BatchDone) and event.step == int(step):
            os.kill(os.getpid(), int(signum))
        yield event

if os.environ["RANK"] == rank:
    Trainer.train = signalled
sys.argv[1:] = arguments
runpy.run_module("nodeshape.train", run_name="__main__", alter_sys=True)
"""


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=300)


def start(processes: int, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run([*([] if processes == 1 else TORCHRUN), "-m", "nodeshape.train", *arguments], cwd)


def train(processes: int, *arguments: str, cwd: Path) -> str:
    done = start(processes, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def signal_one_of_two(signum: int, step: int, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Train in two processes of which the second gets a signal when so many batches are done."""
    (cwd / "signalled.py").write_text(SIGNALLED)
    return run([*TORCHRUN, "signalled.py", "1", str(step), str(signum), *arguments], cwd)


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
def test_a_run_that_one_of_two_processes_was_asked_to_stop_goes_on_in_one(tmp_path: Path) -> None:
    train(1, *SMALL, "--epochs", "3", "--out", "whole", cwd=tmp_path)
    stopped = signal_one_of_two(signal.SIGINT, 4, *SMALL, "--epochs", "3", "--out", "run", cwd=tmp_path)
    assert stopped.returncode != 0
    assert "interrupted in epoch 2 after 2 of 3 batches" in stopped.stdout
    assert "\ntorchrun --nproc-per-node=2 -m nodeshape.train --resume --out run\n" in stopped.stdout
    output = train(1, "--resume", "--out", "run", cwd=tmp_path)
    assert "resuming in epoch 2 after batch 2" in output and "best: " in output
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_a_killed_process_ends_the_run_with_a_message(tmp_path: Path) -> None:
    killed = signal_one_of_two(signal.SIGKILL, 4, *SMALL, "--epochs", "1000", "--out", "run", cwd=tmp_path)
    assert killed.returncode != 0
    assert "lost contact with the others" in killed.stderr and "--resume --out run" in killed.stderr
    assert "epoch 1/1000" in killed.stdout and "epoch 2/1000" not in killed.stdout
    assert weights(tmp_path / "run")


@pytest.mark.slow
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
    done = start(2, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("unreadable files passed over: 6") == 1


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LOCAL_WORLD_SIZE": "2"}, Processes()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Processes()),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, Processes(1, 2, 0, 1)),
        (
            {
                "RANK": "3",
                "WORLD_SIZE": "4",
                "LOCAL_RANK": "1",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "a",
                "MASTER_PORT": "1",
            },
            Processes(3, 4, 1, 2),
        ),
        ({"RANK": "1"}, "RANK=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1: expected whole numbers"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, .*: expected whole numbers"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE=two.*: expected whole numbers"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "a rank must be below its count"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT must say where process 0 is"),
    ],
    ids=str,
)
def test_processes_are_known_by_any_launcher_s_variables_or_refused(
    environment: dict[str, str], expected: Processes | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, Processes):
        assert Processes.from_environment() == expected
    else:
        with pytest.raises(UserError, match=expected):
            Processes.from_environment()


def test_processes_without_local_ranks_train_together(tmp_path: Path) -> None:
    """As plain pods are started, one process each; they choose the run's folder by default, and agree on it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "nodeshape.train", *SMALL, "--epochs", "1"]
    world = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pods = [
        subprocess.Popen(command, cwd=tmp_path, env={**world, "RANK": rank}, stdout=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    said = [pod.communicate(timeout=300)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0]
    assert "on cpu, 2 processes; run folder runs/single-euler" in said[0] and said[1] == ""
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["single-euler"]


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
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    done = start(2, *mistake, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count(message) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "gpus", "count", "expected"),
    [
        ("auto", 0, 1, "cpu"),
        ("auto", 1, 1, "cuda"),
        ("auto", 1, 2, "cpu"),
        ("auto", 2, 2, "cuda:1"),
        ("cpu", 2, 1, "cpu"),
        ("cuda", 1, 1, "cuda"),
        ("cuda", 2, 2, "cuda:1"),
        ("cuda:1", 2, 1, "cuda:1"),
        ("cuda:1", 2, 2, "--device cuda:1: 2 processes need a GPU each; give --device cuda"),
        ("cuda:1", 1, 1, "--device cuda:1: torch sees 1 GPUs; use --device cpu"),
        ("cuda", 1, 2, "--device cuda: torch sees 1 GPUs; use --device cpu"),
    ],
)
def test_each_process_has_its_own_gpu(
    name: str, gpus: int, count: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    processes: Any = SimpleNamespace(count=count, local_count=count, local_rank=count - 1)
    if expected.startswith("--"):
        with pytest.raises(UserError, match=expected):
            session._device(name, processes)
    else:
        assert session._device(name, processes) == torch.device(expected)
