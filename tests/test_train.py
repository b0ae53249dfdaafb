"""Training through the command line and the Trainer: what a run leaves, resuming, and bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image

from nodeshape import _cli
from nodeshape._data.datasets import drawn_data
from nodeshape._data.shapes import draw
from nodeshape._errors import UserError
from nodeshape._models.classifier import ShapeClassifier
from nodeshape._ode import program_op
from nodeshape._training import plots, run_folder
from nodeshape._training.checkpoint import load_checkpoint, load_classifier
from nodeshape._training.recipe import Recipe, balanced
from nodeshape._training.trainer import BatchDone, EpochDone, EpochMetrics, Event, Stopped, Trainer
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


def trainer(method: str = "euler", recipe: Recipe = Recipe(epochs=2, batch_size=13, augment="turn")) -> Trainer:  # noqa: B008
    torch.manual_seed(0)
    model = ShapeClassifier(3, image_size=16, method=method, step_size=0.5)
    return Trainer(model, drawn_data("single", 40, 30, 16, "grey", seed=0), recipe, torch.device("cpu"))


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, signum: signal.Signals) -> None:
    """Let trainers raise a signal when so many batches are done."""
    train = Trainer.train

    def signalled(self: Trainer) -> Generator[Event, None, None]:
        for event in train(self):
            if isinstance(event, BatchDone) and event.step == step:
                signal.raise_signal(signum)
            yield event

    monkeypatch.setattr(Trainer, "train", signalled)


def test_events_tell_each_batch_and_each_epoch() -> None:
    run = trainer()
    events = []
    for event in run.train():
        events.append(event)
        assert event.step == run.steps
        if isinstance(event, BatchDone):
            assert event.loss > 0 and event.learning_rate == run.optimizer.param_groups[0]["lr"]
        else:
            assert event.metrics == run.history[-1]
    assert [type(event) for event in events] == [*[BatchDone] * 4, EpochDone] * 2
    assert [event.step for event in events] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert run.finished and not list(run.train()), "nothing is left to train"


def test_the_latest_of_the_most_accurate_models_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(recipe=Recipe(epochs=4, batch_size=16))
    accuracies = iter([0.5, 0.4, 0.5, 0.6])
    monkeypatch.setattr(run, "_test", lambda: next(accuracies))
    assert [e.model_is_best for e in run.train() if isinstance(e, EpochDone)] == [True, False, True, True]


@pytest.mark.parametrize("method", ["euler", "implicit_midpoint"])
@pytest.mark.parametrize("asked_after", [1, 3, 4])
def test_a_resumed_run_is_identical_to_an_uninterrupted_one(method: str, asked_after: int, tmp_path: Path) -> None:
    """Stopped after the 2nd and the 4th of an epoch's four batches, and after the next epoch's first."""
    whole = trainer(method)
    list(whole.train())

    first = trainer(method)
    for event in first.train():
        if event == Stopped(interrupted=True):
            torch.save(first.state(), tmp_path / "state.pt")
        elif isinstance(event, BatchDone) and event.step == asked_after:
            signal.raise_signal(signal.SIGINT)
    assert event == Stopped(interrupted=True) and first.steps == asked_after + 1

    second = trainer(method)
    second.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.steps == asked_after + 1
    list(second.train())
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert [m.train_loss for m in whole.history] == [m.train_loss for m in second.history]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_the_trainers_only_while_it_trains(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    run = trainer()
    events = run.train()
    assert signal.getsignal(signum) is before
    next(events)
    assert signal.getsignal(signum) is not before
    events.close()
    assert signal.getsignal(signum) is before
    with pytest.raises(RuntimeError, match="of the loop"):
        for _ in run.train():
            raise RuntimeError("of the loop")
    assert signal.getsignal(signum) is before
    with pytest.raises(KeyboardInterrupt):
        for _ in run.train():
            signal.raise_signal(signum)
            signal.raise_signal(signum)
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_checkpoint_that_resume_continues_from(
    signum: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main([*SMALL, "--out", "whole"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        signal_at(patch, 4, signum)
        main(SMALL)
    assert exit_.value.code == 130
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "interrupted in epoch 2 after 2 of 3 batches; continue with:",
        "python -m nodeshape.train --resume --out runs/single-euler",
    ]
    main(["--resume"])
    assert "resuming in epoch 2 after batch 2" in capsys.readouterr().out
    assert_same_run(tmp_path / "runs" / "single-euler", tmp_path / "whole")


def assert_same_run(run: Path, other: Path) -> None:
    """The same weights and metrics, times apart."""
    found, expected = (load_checkpoint(folder / "last.pt") for folder in (run, other))
    for name, value in expected["model"].items():
        assert torch.equal(value, found["model"][name]), name
    for a, b in zip(expected["progress"]["history"], found["progress"]["history"], strict=True):
        assert {**a, "seconds": 0, "test_seconds": 0} == {**b, "seconds": 0, "test_seconds": 0}


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


def test_training_stops_early_after_epochs_without_a_better_test(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(recipe=Recipe(epochs=10, batch_size=16, patience=2))
    accuracies = iter([0.5, 0.6, 0.6, 0.4, 0.9])
    monkeypatch.setattr(run, "_test", lambda: next(accuracies))
    *_, last = run.train()
    assert last == Stopped(interrupted=False) and run.stopped_early
    assert [m.test_accuracy for m in run.history] == [0.5, 0.6, 0.6, 0.4]
    assert list(run.train()) == [last], "it is still so when asked again"


def test_a_last_batch_of_one_image_costs_little_accuracy() -> None:
    """If it counted as a whole batch, the accuracy would fall by a quarter."""
    accuracy = {}
    for count in (240, 241):
        torch.manual_seed(0)
        data = drawn_data("single", count, 300, 16, "grey", seed=0)
        run = Trainer(ShapeClassifier(3, image_size=16, step_size=0.5), data, Recipe(epochs=8), torch.device("cpu"))
        list(run.train())
        accuracy[count] = run.history[-1].test_accuracy
    assert accuracy[240] > 0.75 and accuracy[241] > accuracy[240] - 0.15


def test_the_training_loss_is_the_mean_over_images_whatever_the_last_batch() -> None:
    run = trainer(recipe=Recipe(epochs=1, batch_size=13))
    losses = [event.loss for event in run.train() if isinstance(event, BatchDone)]
    sizes = [13, 13, 13, 1]
    expected = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)
    assert run.history[0].train_loss == pytest.approx(expected)


def test_clipping_bounds_the_norm_of_every_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: dict[float | None, list[float]] = {}
    for limit in (None, 0.1):
        run = trainer(recipe=Recipe(epochs=1, batch_size=16, clip_norm=limit))
        monkeypatch.setattr(run.optimizer, "zero_grad", lambda set_to_none, run=run: run.model.zero_grad(set_to_none))
        norms[limit] = []
        for event in run.train():
            if isinstance(event, BatchDone):
                gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
                norms[limit].append(float(torch.stack([g.norm() for g in gradients]).norm()))
    assert min(norms[None]) > 0.1
    assert norms[0.1] == pytest.approx([0.1] * 3, rel=1e-3)


def test_balanced_weights_give_every_class_the_same_sum() -> None:
    labels = torch.tensor([0] * 7 + [1] * 2 + [2])
    weights = balanced(labels, 3)
    sums = torch.zeros(3).index_add_(0, labels, weights[labels])
    assert torch.allclose(sums, torch.full((3,), 10 / 3))


def test_class_weights_teach_the_rare_class() -> None:
    """One image of a class in eight: without weights its loss counts an eighth, with them a half."""
    data = drawn_data("single", 64, 10, 16, "grey", seed=0)
    data.train.labels[:] = (torch.arange(64) % 8 == 0).long()
    data.classes[:] = ["often", "rarely"]
    gradients = []
    for class_weights in ("none", "balanced"):
        torch.manual_seed(0)
        model = ShapeClassifier(2, image_size=16, step_size=0.5)
        torch.nn.init.zeros_(model.head[-1].weight)  # so that every image gets the logits 0, 0
        torch.nn.init.zeros_(model.head[-1].bias)
        run = Trainer(model, data, Recipe(batch_size=64, class_weights=class_weights), torch.device("cpu"))
        run._step(*data.train.batch(slice(None), torch.device("cpu")), 64)
        gradients.append(model.head[-1].bias.grad)
    assert gradients[0].tolist() == pytest.approx([0.5 - 7 / 8, 0.5 - 1 / 8])
    assert gradients[1].tolist() == pytest.approx([0, 0], abs=1e-6)


def test_autocast_leaves_the_ode_in_float32_and_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(recipe=Recipe(epochs=1, batch_size=16, amp=True))
    kinds: dict[str, torch.dtype] = {}

    def record(name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda m, x, y: kinds.update({name: y.dtype}) if m.training else None)

    record("stem", next(m for m in run.model.stem.modules() if isinstance(m, torch.nn.Conv2d)))
    record("ode", run.model.ode)
    record("head", next(m for m in run.model.head.modules() if isinstance(m, torch.nn.Linear)))
    solves: list[torch.dtype] = []
    solve = program_op.solve

    def recorded(dynamics: object, weights: list[torch.Tensor], y0: torch.Tensor, *rest: object) -> object:
        solves.append(y0.dtype)
        return solve(dynamics, weights, y0, *rest)

    monkeypatch.setattr(program_op, "solve", recorded)
    run._step(*run.data.train.batch(slice(16), torch.device("cpu")), 16)
    assert kinds == {"stem": torch.bfloat16, "ode": torch.float32, "head": torch.bfloat16}
    assert solves == [torch.float32]


def test_tensorboard_logs_losses_and_accuracy_once_per_step(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    main([*SMALL, "--tensorboard", "--out", str(tmp_path / "run")])
    main(["--resume", "--out", str(tmp_path / "run")])
    log = events.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in log.Scalars("batch/loss")] == [1, 2, 3, 4, 5, 6]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    accuracies = [event.value for event in log.Scalars("epoch/test_accuracy")]
    assert accuracies == pytest.approx([line["test_accuracy"] for line in lines])


def test_missing_tensorboard_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        main([*SMALL, "--tensorboard", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_last_is_written_within_an_epoch_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "SAVE_SECONDS", 0.0)
    saved: list[tuple[int, int]] = []
    save = run_folder.save_checkpoint

    def record(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        if path.name == "last.pt":
            progress = load_checkpoint(path)["progress"]
            saved.append((progress["epoch"], progress["batch"]))

    monkeypatch.setattr(run_folder, "save_checkpoint", record)
    main([*SMALL, "--out", str(tmp_path / "run")])
    assert saved == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]


#: ``python -m nodeshape.train`` that saves after every batch and kills itself at the n-th moment of its writes. A write
#: has three: half of the file is written; all of it, under its temporary name; it has its own name.
KILLED = """
import os, signal, sys
from nodeshape import _cli, train
from nodeshape._training import run_folder

run_folder.SAVE_SECONDS = 0
left, fsync, replace = int(sys.argv[1]), os.fsync, os.replace

def moment(prepare=lambda: None):
    global left
    left -= 1
    if left == 0:
        prepare()
        os.kill(os.getpid(), signal.SIGKILL)

os.fsync = lambda file: (moment(lambda: os.truncate(file, os.fstat(file).st_size // 2)), fsync(file))
os.replace = lambda source, target: (moment(), replace(source, target), moment())
_cli.run(lambda: train.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_run_that_resumes_to_identical_weights(
    finished_run: tuple[Path, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    saved = []
    for moment in range(1, 14):
        arguments = ["--resume"] if (run / "last.pt").exists() else SMALL
        killed = [sys.executable, "-c", KILLED, str(moment), *arguments, "--out", str(run)]
        assert subprocess.run(killed, capture_output=True, timeout=300).returncode == -signal.SIGKILL
        if (run / "last.pt").exists():
            load_classifier(run / "last.pt")
            progress = load_checkpoint(run / "last.pt")["progress"]
            saved.append((progress["epoch"], progress["batch"]))
    assert saved == sorted(saved) and (0, 0) in saved and (0, 3) in saved and saved[-1] > (1, 0)
    done = command("--resume", "--out", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(run, finished_run[0])
    assert not list(run.glob(".*")), "what a kill left half written is gone"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "rk4"],
        ["--step-size", "0"],
        ["--step-size", "-1"],
        ["--step-size", "nan"],
        ["--step-size", "inf"],
        ["--epochs", "0"],
        ["--patience", "0"],
        ["--clip-norm", "0"],
        ["--clip-norm", "inf"],
        ["--class-weights", "inverse"],
        ["--dtype", "float16"],
        ["--dtype", "float64", "--amp"],
        ["--stream"],
        ["--lr", "nan"],
        ["--data", "nowhere"],
        ["--data", "empty"],
        ["--data", "one_class"],
        ["--data", "file.png"],
        ["--device", "tpu"],
        ["--device", "cuda:99"],
        ["--device", "cuda:200"],
        ["--device", "cuda:99999999999999999999"],
        ["--device", "cuda:-1"],
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


DAMAGE = [
    {"optimizer": 3},
    {"schedule": 3},
    {"progress": {"epoch": "one"}},
    {"progress": {"epoch": 10**9, "history": []}},
    {"model": {}},
    {"channels": "cmyk"},
    {"task": None},
    {"data": "nowhere"},
    {"batch_size": None},
    {"seed": None},
    {"step_size": "0.5"},
    {"device": ["cpu"]},
]


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_a_last_checkpoint_of_other_content_is_named_in_one_line(
    damage: dict[str, Any], finished_run: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(finished_run[0] / "last.pt", weights_only=True)
    torch.save({**state, **damage}, tmp_path / "last.pt")
    with pytest.raises(SystemExit) as exit_:
        _cli.run(lambda: main(["--resume", "--out", str(tmp_path)]))
    message = capsys.readouterr().err
    assert exit_.value.code == 2 and message.count("\n") == 1 and str(tmp_path / "last.pt") in message


def test_resuming_a_finished_run_says_that_it_is(
    finished_run: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run[0], tmp_path / "run")
    main(["--resume", "--out", str(run)])
    output = capsys.readouterr().out
    assert "this run is finished" in output and "resuming in" not in output and "best: " in output


def test_a_run_of_more_than_twenty_epochs_has_a_learning_curve(tmp_path: Path) -> None:
    history = [EpochMetrics(k, 1 / k, 1 - 0.5 / k, 1.0, 0.1, 20.0, 20.0) for k in range(1, 31)]
    plots.learning_curve(history, "thirty", tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        picture.verify()


def test_pictures_that_fail_do_not_fail_the_run(
    finished_run: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no fonts")

    for name in ("learning_curve", "confusion_matrix", "samples"):
        monkeypatch.setattr(plots, name, fail)
    run = shutil.copytree(finished_run[0], tmp_path / "run")
    main(["--resume", "--out", str(run)])
    output, errors = capsys.readouterr()
    assert errors.count("could not be drawn: RuntimeError: no fonts") == 3
    assert "best: " in output and output.endswith(f"python -m nodeshape.export {run / 'best.pt'}\n")


def test_what_a_killed_export_left_does_not_stop_a_resumed_run(finished_run: tuple[Path, str], tmp_path: Path) -> None:
    run = shutil.copytree(finished_run[0], tmp_path / "run")
    (run / ".export.partial-123").mkdir()
    (run / ".export.partial-123" / "model.onnx").touch()
    (run / ".last.pt.partial-123").touch()
    main(["--resume", "--out", str(run)])
    assert [path.name for path in run.glob(".*")] == [".export.partial-123"]


def test_other_drawn_images_than_the_run_began_with_are_named(finished_run: tuple[Path, str], tmp_path: Path) -> None:
    state = torch.load(finished_run[0] / "last.pt", weights_only=True)
    torch.save({**state, "fingerprint": "of others"}, tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"^the drawn images have changed"):
        main(["--resume", "--out", str(tmp_path)])


def test_a_cut_or_altered_checkpoint_is_refused_by_name_or_loads(
    finished_run: tuple[Path, str], tmp_path: Path
) -> None:
    whole, random = (finished_run[0] / "best.pt").read_bytes(), Random(0)
    damaged = tmp_path / "best.pt"

    def refused() -> bool:
        try:
            load_classifier(damaged)
        except UserError as error:
            assert str(damaged) in str(error)
            return True
        return False

    for length in (0, 1, 3, 100, 1000, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        damaged.write_bytes(whole[:length])
        assert refused(), length
    described = whole.index(b"data.pkl")  # the part that is neither weights nor padding, and the archive's directory
    places = [random.randrange(described, described + 4000) for _ in range(60)]
    places += [random.randrange(len(whole) - 4000, len(whole)) for _ in range(20)]
    outcomes = []
    for place in places:
        altered = bytearray(whole)
        altered[place] ^= 1 << random.randrange(8)
        damaged.write_bytes(altered)
        outcomes.append(refused())
    assert any(outcomes)


def test_loading_a_checkpoint_never_runs_its_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (eval, (f"open({str(tmp_path / 'attacked')!r}, 'w')",))

    torch.save({"model": Attack(), "architecture": {}, "classes": []}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "attacked").exists()
