"""The folder of a run is one run's, goes on longer or elsewhere, starts from trained weights, and survives its disk."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Generator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from PIL import Image
from wobbly import write_photos

from nodeshape import _cli
from nodeshape._data.datasets import drawn_data
from nodeshape._errors import UserError
from nodeshape._files import locked
from nodeshape._models.classifier import ShapeClassifier
from nodeshape._training import run_folder
from nodeshape._training.checkpoint import load_checkpoint, load_classifier, save_checkpoint, start_from
from nodeshape._training.recipe import Recipe
from nodeshape._training.trainer import BatchDone, Event, Stopped, Trainer
from nodeshape.train import main

LITTLE = ["--step-size", "0.5", "--image-size", "16", "--batch-size", "8", "--device", "cpu"]
SMALL = [*LITTLE, "--train-size", "16", "--test-size", "8", "--epochs", "2"]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    main([*SMALL, "--out", str(run)])
    return run


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", 24)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have tests of their own."""
    monkeypatch.setattr(run_folder.RunFolder, "finish", lambda *_: None)


def test_a_folder_that_a_run_holds_is_refused_to_every_other(run: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    with locked(run), locked(new):
        with pytest.raises(UserError, match="another process is training there"):
            main(["--resume", "--out", str(run)])
        with pytest.raises(UserError, match="another process is training there"):
            main([*SMALL, "--out", str(new)])
    assert not list(new.iterdir())
    main(["--resume", "--out", str(run)])


def test_a_run_holds_its_folder_from_its_start_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool | None] = []
    train = Trainer.train

    def look(self: Trainer) -> Generator[Event, None, None]:
        for event in train(self):
            with locked(tmp_path / "run") as free:
                held.append(free)
            yield event

    monkeypatch.setattr(Trainer, "train", look)
    main([*SMALL, "--out", str(tmp_path / "run")])
    assert held == [False] * 6
    with locked(tmp_path / "run") as free:
        assert free


def test_runs_without_a_name_take_the_first_folder_that_is_empty_and_nobody_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    taken = [Path("runs", f"single-euler{suffix}") for suffix in ("", "-2", "-3", "-4")]
    for path in taken:
        path.mkdir(parents=True)
    (taken[0] / "last.pt").touch()
    shutil.rmtree(taken[1])
    taken[1].touch()  # a file
    (taken[3] / ".last.pt.partial-0123").touch()  # of a run that was killed at its start
    with locked(taken[2]):
        main([*SMALL, "--epochs", "1"])
    assert "run folder runs/single-euler-4" in capsys.readouterr().out
    assert {path.name for path in taken[3].iterdir()} >= {"last.pt", "best.pt"} and not list(taken[3].glob(".*"))


def test_a_disk_without_locks_is_told_of(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    main(["--resume", "--out", str(run)])
    assert capsys.readouterr().err.count("has no locks") == 1


@pytest.mark.parametrize("out", ["photos/run", "photos/class1/run", "photos", None])
def test_a_run_folder_among_the_classes_is_refused(
    out: str | None, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent if out else photos)
    before = sorted(photos.rglob("*"))
    with pytest.raises(UserError, match=r"where it would become a class|is a folder with other files"):
        main([*LITTLE, "--data", "photos" if out else ".", *(["--out", out] if out else [])])
    assert sorted(photos.rglob("*")) == before


def test_a_run_folder_beside_train_and_test_is_none_of_their_classes(
    photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    shutil.copytree(photos, project / "train")
    shutil.copytree(photos, project / "test")
    monkeypatch.chdir(project)
    main([*LITTLE, "--data", ".", "--epochs", "1"])
    main(["--resume"])
    with pytest.raises(UserError, match="where it would become a class"):
        main([*LITTLE, "--data", ".", "--out", "train/run"])


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["in memory", "streamed"])
def test_a_run_goes_on_where_its_images_have_moved_to(stream: list[str], photos: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run")]
    main([*LITTLE, *stream, "--data", str(photos), "--epochs", "1", *out])
    moved = photos.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"photos: no such folder; if it has moved, say where to by --data"):
        main(["--resume", *out])
    main(["--resume", "--data", str(moved), "--epochs", "2", *out])
    assert load_checkpoint(tmp_path / "run" / "last.pt")["data"] == str(moved)
    main(["--resume", *out])
    other = shutil.copytree(moved, tmp_path / "other")
    image = next(other.rglob("*.png"))
    image.rename(image.with_name("renamed.png"))
    Image.new("L", (20, 20), 77).save(image.with_name("renamed.png"))
    with pytest.raises(UserError, match="images have changed"):
        main(["--resume", "--data", str(other), *out])


def test_a_finished_run_goes_on_to_more_epochs_than_were_planned(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--resume", "--epochs", "4", "--out", str(run)])
    assert "resuming in epoch 3 after batch 0" in capsys.readouterr().out
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    main(["--resume", "--out", str(run)])
    assert "this run is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="--epochs 2 is fewer than the run's 4"):
        main(["--resume", "--epochs", "2", "--out", str(run)])


def trainer(epochs: int) -> Trainer:
    torch.manual_seed(0)
    data = drawn_data("single", 20, 4, 16, "grey", seed=0)
    model = ShapeClassifier(3, image_size=16, step_size=0.5)
    return Trainer(model, data, Recipe(epochs=epochs, batch_size=10), torch.device("cpu"))


@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_longer_training_goes_on_by_the_learning_rates_of_the_longer_plan(done: int) -> None:
    planned: list[float] = [trainer(5).optimizer.param_groups[0]["lr"]]
    planned += [event.learning_rate for event in trainer(5).train() if isinstance(event, BatchDone)]
    short = trainer(2)
    events = short.train()
    while short.steps < done:
        next(events)
    events.close()
    longer = trainer(5)
    longer.restore(short.state())
    assert longer.optimizer.param_groups[0]["lr"] == pytest.approx(planned[done])
    interrupted = trainer(5)
    interrupted.restore(deepcopy(longer.state()))
    found = [event.learning_rate for event in longer.train() if isinstance(event, BatchDone)]
    assert found == pytest.approx(planned[done + 1 :])
    again = [event.learning_rate for event in interrupted.train() if isinstance(event, BatchDone)]
    assert found == again
    for name, value in longer.model.state_dict().items():
        assert torch.equal(value, interrupted.model.state_dict()[name])


def test_a_new_run_starts_from_trained_weights_and_keeps_the_rows_of_classes_it_knows(run: Path) -> None:
    trained, names = load_classifier(run / "best.pt")
    classes = [names[2], "new", names[0]]
    torch.manual_seed(1)
    model = ShapeClassifier(3, image_size=16, method="implicit_midpoint", step_size=0.25)
    fresh = model.head[-1].weight[1].clone()
    said = start_from(run / "best.pt", model, classes)
    assert said.endswith("; classes it does not know: 1")
    own, others = model.state_dict(), trained.state_dict()
    for name, value in own.items():
        if "head.4" not in name:
            assert torch.equal(value, others[name]), name
    for name in ("head.4.weight", "head.4.bias"):
        assert torch.equal(own[name][0], others[name][2]) and torch.equal(own[name][2], others[name][0])
    assert torch.equal(model.head[-1].weight[1], fresh)


def test_init_is_of_new_runs_and_of_the_same_network(run: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "new")]
    main([*SMALL, "--task", "compound", "--epochs", "1", "--init", str(run / "best.pt"), *out])
    main(["--resume", *out])
    with pytest.raises(UserError, match=r"--init .* differs from the run's"):
        main(["--resume", "--init", str(run / "last.pt"), *out])
    with pytest.raises(UserError, match=r"1 channels, width 64, has other weights than one for 16 pixels, 3 channels"):
        main([*SMALL, "--channels", "rgb", "--init", str(run / "best.pt"), "--out", str(tmp_path / "rgb")])
    with pytest.raises(UserError, match="no such checkpoint"):
        main([*SMALL, "--init", "nowhere.pt", "--out", str(tmp_path / "rgb")])
    assert not (tmp_path / "rgb").exists()


def test_images_that_vanish_while_they_are_streamed_end_the_run_with_all_saved(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Trainer.train

    def take_away(self: Trainer) -> Generator[Event, None, None]:
        for event in train(self):
            if event.step == 3:
                photos.rename(tmp_path / "away")
            yield event

    arguments = [*LITTLE, "--data", str(photos), "--stream", "--epochs", "40", "--out", str(tmp_path / "run")]
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="is no longer there; what was trained is saved"),
    ):
        patch.setattr(Trainer, "train", take_away)
        main(arguments)
    progress = load_checkpoint(tmp_path / "run" / "last.pt")["progress"]
    assert 3 <= progress["epoch"] * 3 + progress["batch"] <= 8, "some batches are read ahead"
    (tmp_path / "away").rename(photos)
    main(["--resume", "--out", str(tmp_path / "run")])


def test_a_full_disk_ends_the_run_in_a_line_that_says_how_to_go_on(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = (run / "last.pt").read_bytes()

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(os, "fsync", full)
        _cli.run(lambda: main(["--resume", "--epochs", "3", "--out", str(run)]))
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1, error
    assert "No space left on device" in error and f"--resume --out {run}" in error
    assert (run / "last.pt").read_bytes() == kept and not list(run.glob(".*"))
    main(["--resume", "--epochs", "3", "--out", str(run)])


def test_a_closing_terminal_stops_training_once_however_often_it_says_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which a shell that runs this may have ignored
    try:
        training = trainer(2)
        events = []
        for event in training.train():
            if isinstance(event, BatchDone):
                for _ in range(3):
                    signal.raise_signal(signal.SIGHUP)
            events.append(event)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert events[-1] == Stopped(interrupted=True) and training.steps == 2


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        training = trainer(1)
        for _ in training.train():
            signal.raise_signal(signal.SIGHUP)
        assert training.finished
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_checkpoint_is_refused_or_gives_its_own_weights_whatever_bytes_are_damaged(tmp_path: Path) -> None:
    state = {"model": {f"layer{k}.weight": torch.randn(3, 40) for k in range(4)}, "architecture": {}, "classes": ["a"]}
    path, damaged = tmp_path / "best.pt", tmp_path / "damaged.pt"
    save_checkpoint(path, state)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 2):
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            found = load_checkpoint(damaged)
        except UserError:
            refused += 1
        else:
            for name, weight in state["model"].items():
                assert torch.equal(found["model"][name], weight), f"byte {place} of {len(whole)}"
    assert refused > len(whole) / 2 / 3, "weights and names are most of a file"


def test_a_solve_by_the_plain_loop_is_told_of(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--resume", "--out", str(run)])
    assert "plain loop" not in capsys.readouterr().out
    monkeypatch.setenv("NODESHAPE_FUSED", "0")
    main(["--resume", "--out", str(run)])
    assert "the ODE is solved by the plain loop, which is slow: " in capsys.readouterr().out
