"""Training through the command line and the Trainer: what a run leaves, resuming, and bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from nodeshape._checkpoint import load_checkpoint, load_classifier
from nodeshape._classifier import ShapeClassifier
from nodeshape._cli import UserError
from nodeshape._datasets import drawn_data
from nodeshape._shapes import draw
from nodeshape._training import Interrupted, Recipe, Trainer
from nodeshape.train import main

SMALL = ["--train-size", "40", "--test-size", "30", "--batch-size", "16", "--step-size", "0.5", "--epochs", "2"]
SMALL += ["--image-size", "16", "--device", "cpu"]


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nodeshape.train", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("train")
    done = command(*SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "single-euler", done.stdout


def test_a_run_leaves_config_metrics_checkpoints_and_pictures(finished_run: tuple[Path, str]) -> None:
    run, _ = finished_run
    pictures = {"samples.png", "learning_curve.png", "confusion_matrix.png"}
    assert {path.name for path in run.iterdir()} == {"config.json", "metrics.jsonl", "last.pt", "best.pt"} | pictures
    for name in pictures:
        with Image.open(run / name) as picture:
            picture.verify()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    for line in lines:
        assert {"train_loss", "test_accuracy", "seconds", "nfe_forward", "nfe_backward"} <= line.keys()
        assert 0 <= line["test_accuracy"] <= 1
        assert line["nfe_forward"] == line["nfe_backward"] == 2  # two Euler steps


def test_the_last_line_is_the_export_command(finished_run: tuple[Path, str]) -> None:
    _, output = finished_run
    assert output.splitlines()[-1] == "python -m nodeshape.export runs/single-euler/best.pt"


def test_best_checkpoint_holds_the_most_accurate_model(finished_run: tuple[Path, str]) -> None:
    run, _ = finished_run
    best = max(json.loads(line)["test_accuracy"] for line in (run / "metrics.jsonl").read_text().splitlines())
    model, classes = load_classifier(run / "best.pt")
    assert classes == ["circle", "triangle", "rectangle"]
    data = drawn_data("single", 3, 30, 16, "grey", seed=0)
    images, labels = data.test.batch(slice(None), torch.device("cpu"))
    with torch.inference_mode():
        accuracy = (model(images).argmax(dim=1) == labels).float().mean()
    assert float(accuracy) == pytest.approx(best)


def test_an_existing_run_is_never_overwritten(finished_run: tuple[Path, str]) -> None:
    run, _ = finished_run
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(UserError, match="--resume"):
        main([*SMALL, "--out", str(run)])
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}


def trainer(method: str = "euler") -> Trainer:
    torch.manual_seed(0)
    model = ShapeClassifier(3, image_size=16, method=method, step_size=0.5)
    recipe = Recipe(epochs=2, batch_size=13, augment="turn")  # 40 images: three batches and one of a single image
    return Trainer(model, drawn_data("single", 40, 30, 16, "grey", seed=0), recipe, torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step:UserWarning")
@pytest.mark.parametrize("method", ["euler", "implicit_midpoint"])
@pytest.mark.parametrize("batches", [1, 4])
def test_a_resumed_run_is_identical_to_an_uninterrupted_one(method: str, batches: int, tmp_path: Path) -> None:
    whole = trainer(method)
    whole.run(lambda metrics: None)

    first = trainer(method)
    steps = 0
    step = first.optimizer.step

    def interrupting_step() -> None:
        nonlocal steps
        step()
        steps += 1
        if steps == batches:
            signal.raise_signal(signal.SIGINT)

    first.optimizer.step = interrupting_step  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        first.run(lambda metrics: None)
    torch.save(first.state(), tmp_path / "state.pt")

    second = trainer(method)
    second.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    second.run(lambda metrics: None)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert [m.train_loss for m in whole.progress.history] == [m.train_loss for m in second.progress.history]


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_that_resume_continues_from(tmp_path: Path) -> None:
    arguments = [
        "--train-size",
        "2000",
        "--test-size",
        "30",
        "--batch-size",
        "20",
        "--step-size",
        "0.1",
        "--epochs",
        "1",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "nodeshape.train", *arguments], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    last = tmp_path / "runs" / "single-euler" / "last.pt"
    for _ in range(300):
        if last.exists():
            break
        time.sleep(0.1)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output.splitlines()[-1] == "python -m nodeshape.train --resume --out runs/single-euler"
    assert load_checkpoint(last)["progress"]["batch"] > 0
    resumed = command("--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming in epoch 1" in resumed.stdout


def folder_of_shapes(root: Path, per_class: int = 6) -> Path:
    for index in range(3 * per_class):
        image, label = draw("single", 5, index, 20)
        path = root / f"class{label}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return root


def test_a_users_folder_trains_and_skips_what_it_cannot_read(tmp_path: Path) -> None:
    data = folder_of_shapes(tmp_path / "data")
    (data / "class1" / "broken.png").write_text("not an image")
    done = command(*SMALL[4:], "--data", str(data), "--channels", "rgb", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "broken.png" in done.stderr and "skipped 1 unreadable file" in done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["classes"] == ["class0", "class1", "class2"]
    strict = command(*SMALL[4:], "--data", str(data), "--strict", "--out", "strict", cwd=tmp_path)
    assert strict.returncode == 2 and "broken.png" in strict.stderr
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "rk4"],
        ["--step-size", "0"],
        ["--step-size", "-1"],
        ["--step-size", "nan"],
        ["--step-size", "inf"],
        ["--epochs", "0"],
        ["--lr", "nan"],
        ["--data", "nowhere"],
        ["--data", "empty"],
        ["--data", "one_class"],
        ["--data", "file.png"],
        ["--device", "tpu"],
        ["--device", "cuda:99"],
        ["--adjoint", "exact"],
        ["--image-size", "2"],
        ["--resume"],
        ["--resume", "--out", "nowhere"],
        ["--resume", "--out", "garbage"],
        ["--out", "file.png"],
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nodeshape import _cli

    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("one_class/only").mkdir(parents=True)
    for index in range(3):
        Image.fromarray(draw("single", 0, index)[0]).save(f"one_class/only/{index}.png")
    Path("file.png").write_text("text")
    Path("garbage").mkdir()
    Path("garbage/last.pt").write_bytes(b"garbage")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        _cli.run(lambda: main(arguments))
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    assert sorted(tmp_path.rglob("*")) == before


def test_loading_a_checkpoint_never_runs_its_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (eval, (f"open({str(tmp_path / 'attacked')!r}, 'w')",))

    torch.save({"model": Attack(), "architecture": {}, "classes": []}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "attacked").exists()
